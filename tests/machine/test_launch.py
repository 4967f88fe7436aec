"""A machine that cannot be had: said before anything boots, with what to do, and exit code 3."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness import cli
from harness.errors import LaunchFailed, TwinwalkError
from harness.machine import l1, qemu, tcg
from harness.wire import layout
from tests.machine.processes import named, unique


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def failure(binary: str | None = None, cpu: str = "max", extra: Sequence[str] = ()) -> str:
    with pytest.raises(LaunchFailed) as caught, tcg.start(binary, cpu, extra):
        pass
    assert caught.value.exit_code == 3
    return str(caught.value)


class TestBinary:
    def test_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "no-such-qemu" in failure(str(tmp_path / "no-such-qemu"))
        monkeypatch.setenv("PATH", str(tmp_path))
        assert "setup" in failure() and "--qemu" in failure()

    def test_not_executable(self, tmp_path: Path) -> None:
        (tmp_path / "qemu").write_text("")
        assert "no QEMU at" in failure(str(tmp_path / "qemu"))

    def test_a_folder(self, tmp_path: Path) -> None:
        assert "no QEMU at" in failure(str(tmp_path))

    def test_not_a_qemu(self, tmp_path: Path) -> None:
        text = failure(script(tmp_path / "q", "echo I am a teapot"))
        assert "is no QEMU" in text and "I am a teapot" in text
        assert "is no QEMU" in failure("/bin/true")

    def test_not_a_program(self, tmp_path: Path) -> None:
        path = tmp_path / "garbage"
        path.write_bytes(b"\x7fELF nonsense")
        path.chmod(0o755)
        assert "does not run" in failure(str(path))

    @pytest.mark.parametrize(
        ("version", "good"), [("4.2.1", False), ("5.1.99", False), ("5.2.0", True), ("10.0.13", True)]
    )
    def test_version(self, version: str, good: bool, tmp_path: Path) -> None:
        path = script(tmp_path / "q", f"echo 'QEMU emulator version {version} (Debian)'")
        if good:
            assert qemu.version(path) == tuple(map(int, version.split(".")))
        else:
            text = failure(path)
            assert "5.2 or later" in text and ".".join(version.split(".")[:2]) in text

    def test_it_fails_at_once(self, tmp_path: Path) -> None:
        """Says its version and then, started in earnest, something else."""
        path = script(tmp_path / "q", 'if [ "$1" = --version ]; then echo QEMU emulator version 9.0.0; exit 0; fi\n'
                                      'echo "q: could not start: no licence" >&2; exit 1')
        text = failure(path)
        assert "no licence" in text and "it was started as" in text and "-nodefaults" in text


@pytest.mark.guest
class TestOptions:
    @pytest.mark.parametrize("flag", ["svm", "npt", "nx", "lm"])
    def test_a_cpu_without_what_l1_needs(self, flag: str) -> None:
        name = unique()
        text = failure(cpu=f"max,-{flag}", extra=["-name", name])
        assert f"has no {flag}" in text and "--cpu max" in text
        assert not named(name)

    def test_a_cpu_model_that_has_no_svm(self) -> None:
        assert "has no svm" in failure(cpu="Nehalem")

    def test_no_such_cpu(self) -> None:
        text = failure(cpu="z80")
        assert "z80" in text and "it was started as" in text

    def test_a_bad_argument(self) -> None:
        text = failure(extra=["-no-such-option"])
        assert "no-such-option" in text and "it was started as" in text

    def test_another_protocol(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(l1, "PROTOCOL", layout.PROTOCOL + 1)
        assert f"protocol {layout.PROTOCOL}" in failure()

    def test_a_guest_that_does_not_come_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Kept from booting by a debug stop: L1 never says hello."""
        monkeypatch.setattr(tcg, "_BOOT_TIMEOUT", 0.5)
        real = qemu.Qemu.command

        def never_continues(self: qemu.Qemu, name: str, **arguments: object) -> object:
            return None if name == "cont" else real(self, name, **arguments)

        monkeypatch.setattr(qemu.Qemu, "command", never_continues)
        text = failure()
        assert "did not come up" in text and "started as" in text


@pytest.mark.guest
@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--qemu", "/no/such/qemu"], "/no/such/qemu"),
        (["--qemu", "/bin/true"], "is no QEMU"),
        (["--cpu", "max,-svm"], "has no svm"),
        (["--cpu", "max,-npt"], "has no npt"),
        (["--qemu-arg=-no-such-option"], "no-such-option"),
    ],
)
def test_exit_code_3(argv: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "-k", "first-light", *argv]) == 3
    out = capsys.readouterr()
    assert reason in out.err and "Traceback" not in out.err + out.out


def test_every_error_says_its_exit_code() -> None:
    assert {e.__name__: e.exit_code for e in TwinwalkError.__subclasses__()} == {
        "UsageError": 2, "LaunchFailed": 3, "MachineLost": 3, "WorkerLost": 3, "ConnectionLost": 3}
