"""The wheel: all that a run needs is in it, and it works far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True,
                   capture_output=True, timeout=300)
    (path,) = folder.glob("twinwalk-*.whl")
    return path


def test_what_is_in_it(wheel: Path) -> None:
    """Every file of the three folders that git has, and nothing at the top but the package."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert {"harness/py.typed", "harness/guests/l1/main.c", "harness/guests/l0/init",
            "harness/scenarios/first-light.toml", "harness/report/page/page.js"} <= names
    assert {name.split("/")[0] for name in names} == {"harness"}
    for folder in ("guests", "scenarios"):
        here = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {f"harness/{name}" for name in here} <= names


def test_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """Installed into a folder of its own, and run from another one: a scenario of the library, in lockstep."""
    place, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target",
                    str(place), str(wheel)], check=True, timeout=300)
    environment = os.environ | {"PYTHONPATH": str(place)}

    def run(*argv: str) -> str:
        done = subprocess.run([str(place / "bin" / "twinwalk"), *argv], cwd=elsewhere, env=environment, text=True,
                              capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "agreed" in run("run", "-k", "first-light", "--machine", "tcg")
    assert "  twinwalk list -k sweeps" in run("list", "--help")  # no launcher there
    where = subprocess.run([sys.executable, "-c", "from harness import options; print(options.LIBRARY)"], cwd=elsewhere,
                           env=environment, text=True, capture_output=True, check=True).stdout
    assert where.strip() == str(place / "harness" / "scenarios")
