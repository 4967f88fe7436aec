"""The jobs of docs/ci: their commands are ones that twinwalk has, and the one that can be run here does its work."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from harness.cli import parser
from tests.conftest import ROOT

CI = ROOT / "docs" / "ci"


@pytest.mark.parametrize("name", ["README.md", "github-actions.yml", "gitlab-ci.yml"])
def test_commands(name: str) -> None:
    commands = re.findall(r"\./twinwalk ([a-z][^|;`\n]*)", (CI / name).read_text(encoding="utf-8"))
    assert commands
    for command in commands:
        parser().parse_args(command.replace("$BUILD", "build").split())


def _cron(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", str(CI / "cron.sh"), str(folder), *arguments], capture_output=True, text=True,
                          timeout=120, check=False, cwd="/", env=os.environ | {"NO_COLOR": "1"})


@pytest.mark.guest
def test_cron(tmp_path: Path) -> None:
    """Quiet where all is well; what is new comes with its bundle; a lost machine is tried once more."""
    light = str(ROOT / "scenarios" / "first-light.toml")
    done = _cron(tmp_path / "a", "--machine", "tcg", light)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (today,) = (tmp_path / "a").iterdir()
    assert json.loads((today / "result.json").read_text())["totals"]["vmruns"] and (today / "result.xml").exists()
    known = str(ROOT / "scenarios" / "walk" / "nested-reserved.toml")
    done = _cron(tmp_path / "b", "--machine", "tcg", "--strict", known)
    assert done.returncode == 1 and "nested.reserved" in done.stdout
    (today,) = (tmp_path / "b").iterdir()
    assert list((today / "bundles").iterdir())
    done = _cron(tmp_path / "c", "--machine", "tcg", "--qemu", "/nowhere/qemu", light)
    assert done.returncode == 3 and done.stdout.count("no QEMU at") == 1
