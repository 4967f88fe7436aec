"""Scenario files as pytest's tests: a run of pytest in a process of its own, as users have it."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.conftest import LIBRARY, ROOT

pytestmark = pytest.mark.guest

GOOD = (LIBRARY / "first-light.toml").read_text(encoding="utf-8")


def _pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In `folder`, which is no part of the checkout, with none of its settings."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "harness.pytest_plugin", "-p", "no:cacheprovider", *arguments],
        capture_output=True, text=True, timeout=180, check=False, cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "light.toml").write_text(GOOD)
    return tmp_path


def test_scenarios_are_tests(folder: Path) -> None:
    """Files of others, sweeps and errata are no tests; the machine is named in the XML."""
    (folder / "deep.toml").write_text(GOOD.replace('title =', 'guest = "5-level"\ntitle =', 1))
    (folder / "other.toml").write_text("[tool.black]\nline-length = 3\n")
    done = _pytest(folder, "--twinwalk-machine=tcg", "--junit-xml=out.xml", "-v", "-p",
                   "junitxml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "light.toml::light" in done.stdout and "2 passed" in done.stdout
    properties = {one.get("name"): one.get("value") for one in ET.parse(folder / "out.xml").iter("property")}
    assert (properties["machine"] or "").startswith("tcg: QEMU ")
    selected = _pytest(folder, "--twinwalk-machine=tcg", "-m", "not needs_la57", "-v")
    assert "1 passed, 1 deselected" in selected.stdout, selected.stdout


def test_without_the_option_nothing_is_collected(folder: Path) -> None:
    assert _pytest(folder).returncode == 5
    listed = _pytest(folder, "--markers")
    assert "needs_la57" in listed.stdout


def test_a_divergence_fails_with_both_walks(folder: Path) -> None:
    """Here a known one, which --twinwalk-strict makes a failure."""
    (folder / "known.toml").write_text((LIBRARY / "walk" / "nested-reserved.toml").read_text(encoding="utf-8"))
    assert _pytest(folder, "--twinwalk-machine=tcg", "known.toml").returncode == 0
    done = _pytest(folder, "--twinwalk-machine=tcg", "--twinwalk-strict", "known.toml")
    assert done.returncode == 1 and "machine" in done.stdout and "nested.reserved" in done.stdout, done.stdout


def test_a_bad_file_is_an_error_with_its_line(folder: Path) -> None:
    (folder / "light.toml").write_text(GOOD.replace("run = [", 'run = ["peek a", ', 1))
    done = _pytest(folder, "--twinwalk-machine=tcg")
    assert done.returncode == 2 and "light.toml:" in done.stdout and "peek a" in done.stdout, done.stdout


def test_no_machine_is_said_once_for_each(folder: Path) -> None:
    done = _pytest(folder, "--twinwalk-machine=tcg", "--twinwalk-qemu=/nowhere/qemu", "light.toml")
    assert done.returncode == 1 and "no QEMU at '/nowhere/qemu'" in done.stdout, done.stdout


def test_workers_have_a_machine_each(folder: Path) -> None:
    for number in range(4):
        (folder / f"light{number}.toml").write_text(GOOD)
    done = _pytest(folder, "--twinwalk-machine=tcg", "-p", "xdist", "-n", "2")
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout + done.stderr
