"""Runs on another host, which is a real OpenSSH server on loopback: what comes of them is what comes of a run here, and
whatever breaks is said, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import cli, far
from harness.machine import kvm
from tests.conftest import LIBRARY, ROOT
from tests.machine.sshd import Sshd, serving

pytestmark = pytest.mark.guest

_FEW = str(LIBRARY / "first-light.toml")
_MANY = (str(LIBRARY / "walk"), str(LIBRARY / "faults"), "-k", "not sweeps")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Sshd]:
    with serving(tmp_path / "sshd") as started:
        yield started


def _begin(server: Sshd, *arguments: str, machine: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "harness.cli", "run", "--machine", machine or server.machine, *arguments], cwd=ROOT,
        env=server.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _run(server: Sshd, *arguments: str, machine: str = "") -> tuple[int, str, str]:
    process = _begin(server, *arguments, machine=machine)
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def _refused(server: Sshd, machine: str = "") -> str:
    """What a run says that cannot begin; it leaves nothing."""
    code, output, errors = _run(server, _FEW, machine=machine)
    assert code == 3, output + errors
    assert "Traceback" not in errors
    assert server.clean()
    return errors


def _wait(condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


class TestTheSameAsHere:
    def test_reports(self, server: Sshd, tmp_path: Path) -> None:
        """Walks, divergences, coverage, exit code: all but the host and the time."""
        wanted = [str(LIBRARY / "walk"), "-k", "code-reserved or table-read-only", "--strict"]
        found: dict[str, Any] = {}
        suites, texts = {}, {}
        for name, machine in (("far", server.machine), ("here", "tcg")):
            files = {kind: tmp_path / f"{name}.{kind}" for kind in ("json", "junit")}
            code, output, errors = _run(server, *wanted, "--json", str(files["json"]), "--junit", str(files["junit"]),
                                        machine=machine)
            assert code == 1, output + errors
            texts[name] = re.sub(r" +[\d.]+ s ", " ", output.partition("machine  ")[0])
            found[name] = json.loads(files["json"].read_text())
            suites[name] = [(case.get("name"), [(part.tag, part.text) for part in case])
                                    for case in ET.parse(files["junit"]).iter("testcase")]
        far_machine, here_machine = found["far"].pop("machine"), found["here"].pop("machine")
        assert far_machine.pop("host") == server.machine.removeprefix("ssh://").removesuffix("/tcg")
        assert here_machine.pop("host") == "" and far_machine == here_machine
        for name in ("far", "here"):
            del found[name]["totals"]["seconds"]
        assert found["far"] == found["here"]
        assert found["far"]["divergences"] and "model" in texts["far"] and texts["far"] == texts["here"]
        assert suites["far"] == suites["here"]
        assert server.clean()

    def test_sweeps_on_two_machines(self, server: Sshd, tmp_path: Path) -> None:
        result = tmp_path / "result.json"
        code, output, errors = _run(server, str(LIBRARY / "sweeps" / "guest.toml"), "--budget", "300", "--jobs", "2",
                                    "--json", str(result))
        assert code == 0, output + errors
        (sweep,) = json.loads(result.read_text())["sweeps"]
        assert sweep["done"] + sweep["skipped"] == 300 and sweep["vmruns"] > 300
        assert server.clean()

    def test_bundles(self, server: Sshd, tmp_path: Path) -> None:
        """Repeated, shrunk and written as of a machine here; and none names the host as what to replay on."""
        code, output, errors = _run(server, str(LIBRARY / "walk"), "-k", "non-canonical[fetch]", "--strict",
                                    "--bundles", str(tmp_path / "found"))
        assert code == 1, output + errors
        (bundle,) = (tmp_path / "found").iterdir()
        about = json.loads((bundle / "bundle.json").read_text())
        assert about["target"]["machine"] == "tcg" and "127.0.0.1" in about["machine"]["host"]
        assert json.loads((bundle / "records.json").read_text())
        assert server.clean()


class TestRefused:
    def test_wrong_key(self, server: Sshd) -> None:
        (server.folder / "authorized_keys").write_text((server.folder / "other.pub").read_text())
        said = _refused(server)
        assert "does not let" in said and "ssh-copy-id" in said

    def test_unknown_host(self, server: Sshd) -> None:
        """Its fingerprint is said as ssh says it, and what takes it down."""
        server.known.write_text("")
        said = _refused(server)
        shown = subprocess.run(["ssh-keygen", "-lf", str(server.folder / "host.pub")], capture_output=True, text=True,
                               check=True).stdout.split()[1]
        assert "is not a known host" in said and shown in said and f"ssh -p {server.port}" in said
        assert server.known.read_text() == ""

    def test_another_host(self, server: Sshd) -> None:
        server.known.write_text(f"[127.0.0.1]:{server.port} {(server.folder / 'other.pub').read_text()}")
        said = _refused(server)
        assert "another host key" in said and f"ssh-keygen -R '[127.0.0.1]:{server.port}'" in said

    def test_nobody_there(self, server: Sshd) -> None:
        server.stop()
        assert "cannot be reached" in _refused(server)

    def test_passphrase(self, server: Sshd) -> None:
        key = server.home / ".ssh" / "id_ed25519"
        subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(key)], check=True)
        said = _refused(server)
        assert "ssh-add" in said

    def test_settings(self, server: Sshd) -> None:
        """~/.ssh/config: an alias with its user, port, key and known hosts."""
        ssh = server.home / ".ssh"
        (ssh / "id_ed25519").rename(server.folder / "key")
        server.known.rename(server.folder / "hosts")
        (ssh / "config").write_text(
            f"Host far\n  HostName 127.0.0.1\n  Port {server.port}\n  User root\n"
            f"  IdentityFile {server.folder / 'key'}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {server.folder / 'hosts'}\n".replace("User root", f"User {server.user}"))
        code, output, errors = _run(server, _FEW, machine="ssh://far/tcg")
        assert code == 0, output + errors
        assert "host far," in output.replace("\n         ", " ")

    def test_password(self, server: Sshd) -> None:
        code, output, errors = _run(server, _FEW, machine="ssh://me:hush@127.0.0.1/tcg")
        assert code == 2 and "no password" in errors and "hush" not in output + errors


def _path(folder: Path, **programs: str) -> str:
    """A PATH that has nothing but a shell and those scripts."""
    folder.mkdir()
    (folder / "sh").symlink_to("/bin/sh")
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return str(folder)


class TestWhatTheHostLacks:
    def test_new_python(self, tmp_path: Path) -> None:
        path = _path(tmp_path / "bin", python3="echo False 3.9.2")
        with serving(tmp_path / "sshd", PATH=path) as server:
            said = _refused(server)
        assert "no Python 3.11 or later (python3 is 3.9.2)" in said and "install" in said

    def test_any_python(self, tmp_path: Path) -> None:
        with serving(tmp_path / "sshd", PATH=_path(tmp_path / "bin")) as server:
            assert "no Python 3.11 or later: install" in _refused(server)

    def test_qemu(self, tmp_path: Path) -> None:
        path = _path(tmp_path / "bin", python3=f'exec {sys.executable} "$@"')
        with serving(tmp_path / "sshd", PATH=path) as server:
            said = _refused(server)
        assert "no QEMU" in said and "install it there" in said and "127.0.0.1" in said

    def test_kvm(self, server: Sshd) -> None:
        """Which is what is meant where nothing else is said."""
        reason, remedy = kvm.why_not()
        if not reason:
            pytest.skip("this host is an AMD host with KVM")
        said = _refused(server, server.machine.removesuffix("/tcg"))
        assert "on " in said and reason in said and remedy in said

    @pytest.mark.parametrize("size", ["4m", "1m"])
    @pytest.mark.skipif(os.geteuid() != 0, reason="a small tmpfs is made by root alone")
    def test_room(self, tmp_path: Path, size: str) -> None:
        full = tmp_path / "full"
        full.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(full)], check=True)
        try:
            with serving(tmp_path / "sshd", TMPDIR=str(full)) as server:
                said = _refused(server)
            assert str(full) in said and "make room" in said and "TMPDIR" in said
            assert list(full.iterdir()) == []
        finally:
            subprocess.run(["umount", str(full)], check=True)


class TestBroken:
    def test_connection(self, server: Sshd, tmp_path: Path) -> None:
        """It is made anew, and nothing is checked twice or not at all."""
        result = tmp_path / "result.json"
        process = _begin(server, *_MANY, "--json", str(result))
        journal = tmp_path / "result.json.journal"
        _wait(lambda: _lines(journal) >= 50 or process.poll() is not None, "no results came")
        assert server.cut()
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, output + errors
        assert "was lost" in errors and "is there again" in errors
        listed = subprocess.run([sys.executable, "-m", "harness.cli", "list", *_MANY], cwd=ROOT, capture_output=True,
                                text=True, check=True).stdout
        assert json.loads(result.read_text())["totals"]["scenarios"] == len(listed.splitlines())
        assert "of" not in re.findall(r"  scenarios .*", output)[0]
        assert server.clean()

    def test_host(self, server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                  capsys: pytest.CaptureFixture[str]) -> None:
        """It is gone for good: what was checked is reported all the same."""
        monkeypatch.setattr(far, "RETRY", 1.0)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        result, journal = tmp_path / "result.json", tmp_path / "result.json.journal"

        def stop() -> None:
            _wait(lambda: _lines(journal) >= 20, "no results came")
            server.stop()

        stopper = threading.Thread(target=stop)
        stopper.start()
        code = cli.main(["run", "--machine", server.machine, *_MANY, "--json", str(result)])
        stopper.join()
        said = capsys.readouterr()
        assert code == 3 and "was not to be had again" in said.err, said.err
        assert json.loads(result.read_text())["totals"]["scenarios"] >= 20
        assert "not all scenarios were run" in said.out
        assert server.clean()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_off(self, server: Sshd, tmp_path: Path, number: signal.Signals) -> None:
        """Ctrl-C, or worse: with the run all that it started there is gone, its folder too."""
        result, journal = tmp_path / "result.json", tmp_path / "result.json.journal"
        process = _begin(server, *_MANY, "--json", str(result))
        _wait(lambda: _lines(journal) >= 5, "no results came")
        assert any("qemu" in line for line in server.processes()) and server.left()
        assert (server.scratch / server.left()[0]).stat().st_mode & 0o777 == 0o700
        process.send_signal(number)
        process.communicate(timeout=240)
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert json.loads(result.read_text())["totals"]["scenarios"] >= 5
            assert not server.processes() and not server.left()
        assert server.clean()

    def test_killed_there(self, server: Sshd, tmp_path: Path) -> None:
        """Its processes there are killed, those that clean up too: the run goes on, and cleans up behind them."""
        journal = tmp_path / "result.json.journal"
        process = _begin(server, *_MANY, "--json", str(tmp_path / "result.json"))
        _wait(lambda: _lines(journal) >= 5, "no results came")
        before = server.left()
        for pid in server.pids():
            os.kill(pid, signal.SIGKILL)
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, output + errors
        assert "was lost" in errors and before and server.clean()
