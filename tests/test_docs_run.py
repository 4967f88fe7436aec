"""What the documents say one may type is typed: every command of README and docs is run, on a part of the library.

What a document leaves to the reader (a kernel of his own, a bundle, a dump) is put where the document says, budgets are
cut, and other releases' versions are this host's QEMU: that those can be had is tests/test_matrix.py's business. The
tutorial is followed to the letter, in a copy of the checkout.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from harness import bench, bench_fuzz, cli, options
from harness.errors import LaunchFailed
from harness.lockstep import errata
from harness.machine import guests, kernel
from harness.scenario import sweepfiles
from harness.sweeping import Plan
from tests.conftest import LIBRARY, ROOT
from tests.machine import foreign_l1
from tests.test_docs import DOCUMENTS, commands
from tests.test_explain import elf
from tests.test_library_use import dump

pytestmark = pytest.mark.guest

QEMU: Final = "qemu-system-x86_64"
SAMPLE: Final = (
    "first-light", "walk/nested-pml4e-global", "ad/cut-short-nested", "contexts/guests", "faults/nested-rights-last",
    "intercepts/cr-bits", "modes/off-state", "state/as-built", "vmrun/asid", "walk/table-read-only",
)
"""The part of the library, beside all sweeps and errata."""
BUNDLED: Final = "walk/nested-pml4e-global"
"""A known erratum of this QEMU: with --strict there is a bundle of it."""
ELSEWHERE: Final = {
    "setup": "tests/test_ci_files.py and every run of the tests begin with it",
    "test": "it is what runs this",
    "campaign": "tests/test_campaigning.py has a scheduler and workers",
    "fetch": "it asks the mirror: tests/machine/test_suites.py and test_versions.py",
    "found/linux-": "tests/machine/test_observe.py: a bundle of what is observed",
    "amd-iommu": "tests/machine/test_observe_xen.py",
    "qmp:": "tests/machine/test_live.py",
    "ssh://": "tests/machine/test_ssh.py has a server for it",
    "matrix --kernel": "tests/test_matrix.py",
    "--kernel 6.1..": "tests/test_bisect.py",
}
"""What is not run here, and where it is: words of a command."""
CODES: Final = {"run second.toml": {1}, "doctor": {0, 3}, "replay": {0, 1}, "bisect": {0, 1}, "matrix": {0, 1}}
"""Exit codes that say that a command did its work; of others 0."""


def _adapted(arguments: list[str]) -> str:
    """The command with its budgets cut, and with what a reader has of his own; {...} is filled in."""
    text = shlex.join(arguments)
    command = arguments[0]
    for pattern, new in (
        (r"(--kernel) '?[\w~$./-]+'?( --modules '?[\w~$./-]+'?)?", r"\1 {image} --modules {modules}"),
        (r"--qemu '?[~\w./,-]+'?", "--qemu {qemu}"), (r"--under \S+", "--under {qemu}"),
        (r"--budget \S+", "--budget 24"), (r"--pairs \d+", "--pairs 500"), (r" --exhaustive", " --budget 24"),
        (r"--jobs \d+", "--jobs 2"), (r"sweeps/joint\[\.\.\.\]", "{case}"), (r"--seconds \d+", "--vmruns 20"),
    ):
        if command == "observe" and new.startswith(r"\1 {image}"):
            text = re.sub(r"--kernel \S+", "--kernel {foreign}", text)
            text = re.sub(r"--initrd \S+", "--initrd {foreign}", text)
        else:
            text = re.sub(pattern, new, text)
    if command == "observe" and "--vmruns" not in text:
        text = text.replace("observe linux", "observe linux --vmruns 50")
        text = text.replace("{foreign}", "{foreign} --vmruns 20", 1)
    if command == "bench" and "--pairs" not in text:
        text += " --pairs 500"
    if command == "fuzz" and "--budget" not in text:
        text += " --budget 24"
    if command == "matrix":
        text = re.sub(r" --kernel \S+ --modules \S+", "", text)
    if command in ("run", "fuzz", "bench", "bisect", "replay") and "--machine" not in text:
        own = command in ("bisect", "replay")  # go by the bundle
        text += " --machine kvm-on-tcg" if "{image}" in text else "" if own else " --machine tcg"
    if command == "run":
        text += "" if "--budget" in text else " --budget 12"
        if "kvm-on-tcg" in text and " -k " not in text:
            text += " -k first-light"
    return text


def _documented() -> dict[str, str]:
    """Each that is run, as it is run, with one document that has it; the same after cutting is the same."""
    found: dict[str, str] = {}
    for path in DOCUMENTS:
        for arguments in commands(path):
            text = shlex.join(arguments)
            if path.name != "tutorial.md" and not any(words in text for words in ELSEWHERE):
                found.setdefault(_adapted(arguments), path.name)
    return found


def test_what_is_run_elsewhere_is_still_documented() -> None:
    everything = [shlex.join(one) for path in DOCUMENTS for one in commands(path)]
    for words in ELSEWHERE:
        assert any(words in text for text in everything), f"no document has a command with {words!r}: take it out"
    assert len(_documented()) > 40


@pytest.fixture(scope="module")
def case() -> str:
    """A case of sweeps/joint, by name."""
    sweeps = sweepfiles.load([LIBRARY], lambda name: name == "sweeps/joint")
    return next(Plan(sweeps, 1).batches())[0].name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small library in `scenarios`, and with all that documents take for granted."""
    folder = tmp_path_factory.mktemp("reader")
    small = folder / "scenarios"
    hazards = {one.shown[0].partition("[")[0] for one in errata.load(LIBRARY / "errata") if one.hazard}
    for name in sorted(hazards.union(SAMPLE)):  # matrix tries what loses a machine
        (small / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(LIBRARY / f"{name}.toml", small / f"{name}.toml")
    for name in ("errata", "sweeps"):
        shutil.copytree(LIBRARY / name, small / name)
    for name in ("my-scenario.toml", "second.toml"):
        shutil.copy(LIBRARY / f"{BUNDLED}.toml", folder / name)
    words = dump().memory.bytes
    (folder / "memory.bin").write_bytes(words)
    (folder / "dump.elf").write_bytes(elf([(0, bytes(words))]))
    guests.build_l1()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made = ["run", "--machine", "tcg", "-q", "--strict", "my-scenario.toml", "--bundles", "found"]
        assert cli.main([*made, "--json", "result.json"]) == 1
    (bundle,) = (folder / "found").iterdir()
    (folder / "docs").mkdir()
    shutil.copytree(bundle, folder / "finding.twin")
    bundle.rename(folder / "found" / "NAME.twin")
    return folder


@pytest.mark.parametrize("command", sorted(_documented()))
def test_a_command(command: str, place: Path, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                   capsys: pytest.CaptureFixture[str]) -> None:
    here = tmp_path / "here"
    shutil.copytree(place, here)
    monkeypatch.chdir(here)
    for module in [one for name, one in sys.modules.items() if name.startswith("harness")]:
        if getattr(module, "LIBRARY", None) == options.LIBRARY and module is not options:
            monkeypatch.setattr(module, "LIBRARY", here / "scenarios")
    for module, name in ((bench, "_CASES"), (bench, "_LITMUS_CASES"), (bench_fuzz, "PROGRAMS"), (cli, "BUDGET")):
        monkeypatch.setattr(module, name, 24)
    values = {"qemu": shutil.which(QEMU) or QEMU, "case": case, "image": "", "modules": ""}
    if "kvm-on-tcg" in command or "{image}" in command or "observe linux" in command:
        try:
            found = kernel.find(None, None)
        except LaunchFailed as reason:
            pytest.skip(f"no kernel here: {reason}")
        values |= {"image": str(found.image), "modules": str(found.modules[0])}
    if "{foreign}" in command:
        values["foreign"] = str(foreign_l1.build(tmp_path))
    arguments = shlex.split(re.sub(r"\{(\w+)\}", lambda match: values[match[1]], command))
    code = cli.main(arguments)
    said = capsys.readouterr()
    wanted = next((codes for words, codes in CODES.items() if command.startswith(words)), {0})
    assert code in wanted, said.out + said.err
    assert "Traceback" not in said.err


# --- the tutorial ---------------------------------------------------------------------------------

TUTORIAL: Final = ROOT / "docs" / "tutorial.md"
_BLOCK: Final = re.compile(r"^```(\w*)\n(.*?)^```$|^((?: {4}\S[^\n]*\n)+)", re.MULTILINE | re.DOTALL)


def _checkout(folder: Path) -> None:
    """A copy of what a run needs, under git, with a launcher that needs no setting up."""
    for name in ("harness", "scenarios", "guests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    launcher = folder / "twinwalk"
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -m harness.cli "$@"\n')
    launcher.chmod(0o755)
    for command in ("init -q", "add -A", "-c user.name=reader -c user.email=reader@example.org commit -q -m checkout"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")
def test_the_tutorial(tmp_path: Path) -> None:
    """Step by step: each file is written, each `expect` put where it says, each command ends with the exit code that
    its comment has, and what is shown of its output is in it."""
    _checkout(tmp_path)
    environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    text, output, ran = TUTORIAL.read_text(encoding="utf-8"), "", 0
    for block in _BLOCK.finditer(text):
        language, content, typed = block.groups()
        if language == "toml" and content.startswith("expect"):
            path = tmp_path / "first.toml"
            kept = [line for line in path.read_text().splitlines() if not line.startswith("expect")]
            path.write_text("\n".join([*kept, content]))
        elif language == "toml":
            name = re.findall(r"`([\w.]+\.toml)`:", text[: block.start()])[-1]
            (tmp_path / name).write_text(content)
        elif typed is None:
            for line in content.splitlines():
                shown = re.sub(r"[\d.]+ s ", "", " ".join(line.split()))
                assert shown in re.sub(r"[\d.]+ s ", "", " ".join(output.split())), f"{line!r} is not in: {output}"
        else:
            for line in typed.splitlines():
                wanted = re.search(r"exit code (\d)", line)
                done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True,
                                      text=True, timeout=300)
                output = done.stdout + done.stderr
                assert done.returncode == int(wanted[1] if wanted else 0), f"{line}\n{output}"
                ran += "./twinwalk" in line
    assert ran == 7
