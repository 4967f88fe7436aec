"""`twinwalk observe linux`: the distribution's kernel as L1, and in it as L2; consoles, SSH, and what both do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from harness import cli
from harness.errors import LaunchFailed, MachineLost
from harness.lockstep.errata import Erratum, of_layers
from harness.lockstep.observe import Observer
from harness.machine import linux, observed
from harness.machine.cpio import Archive
from harness.machine.inside import Inside, make_key
from harness.machine.line import Line, NoAnswer
from harness.machine.linux import Images
from harness.machine.linux_life import Life, counted
from harness.machine.observed import Foreign, Options

pytestmark = pytest.mark.guest

PATIENCE = 600.0


@pytest.fixture(scope="module")
def images() -> Images:
    try:
        return linux.build(lambda text: None)
    except LaunchFailed as reason:
        pytest.skip(f"no Linux for L1: {reason}")


@contextmanager
def started(images: Images, initrd: Path | None, memory: int) -> Iterator[tuple[Foreign, tuple[Line, Line]]]:
    """L1 in memory, and the lines to it and to its L2."""
    with ExitStack() as stack:
        lines = stack.enter_context(Line("L1")), stack.enter_context(Line("L2"))
        options = Options(images.kernel, initrd, images.append, memory=memory, wait=PATIENCE, lines=lines)
        yield stack.enter_context(observed.start(options)), lines


def test_l1_panics(images: Images) -> None:
    with started(images, None, 512) as (machine, _), pytest.raises(
            MachineLost, match=r"L1 panicked: .*Kernel panic - ") as caught:
        list(machine.stops(lambda stop: True))
    assert caught.value.exit_code == 3 and "L1: " in caught.value.log


def test_l2_panics(images: Images, errata: list[Erratum]) -> None:
    """L2 has no root: it boots as far as that, each VMRUN checked, with no finding but QEMU's known errata."""
    with started(images, images.initrd, 768) as (machine, lines):
        observer = Observer("linux", machine.memory, machine.cpu, of_layers(errata, machine.identity.layers))
        # The machine may tell the panic itself, before it is asked for one more stop.
        with Life(lines, Archive().finish(), machine.ssh_port(), lambda: 0) as life, suppress(MachineLost):
            for stop in machine.stops(observer.plausible, lambda: not life.failed):
                observer.stop(stop)
                if life.failed:
                    break
        assert life.failed == "L2 panicked"
        assert "L2 panicked: " in machine.lost(life.failed).reason and "VFS" in machine.lost(life.failed).reason
    seen = observer.seen
    assert seen.vmruns > 2000 and seen.accesses > 1000 and not seen.unpaired and not seen.elsewhere
    assert [one for one in seen.divergences if one.erratum is None] == []


def test_ssh(images: Images) -> None:
    """Commands and files; who has another key gets in no more than what has another host key is believed."""
    with started(images, images.initrd, 512) as (machine, (l1, _)):
        key, port, over = make_key(), machine.ssh_port(), threading.Event()
        runs = threading.Thread(target=lambda: list(machine.stops(lambda stop: True, lambda: not over.is_set())))
        runs.start()
        try:
            l1.expect("L1# ", PATIENCE)
            public = f"{key.get_name()} {key.get_base64()}"
            l1.run(f"mkdir -p /root/.ssh; echo {public} >/root/.ssh/authorized_keys", PATIENCE)
            host_key = l1.run("grep -o '^ssh-ed25519 [^ ]*' /tmp/host_key.pub", PATIENCE)
            with Inside(port, key, host_key, PATIENCE) as inside:
                data = bytes(range(256)) * 999
                inside.put(data, "/tmp/file")
                assert inside.get("/tmp/file") == data and b"Linux" in inside.run("cat /proc/version")
                with pytest.raises(NoAnswer, match=r"`cat /none` failed in L1 with status 1: .*No such file"):
                    inside.get("/none")
            with pytest.raises(NoAnswer, match="cannot be reached over SSH: Authentication"):
                Inside(port, make_key(), host_key, PATIENCE)
            other = make_key()
            with pytest.raises(NoAnswer, match="is not L1: its key is"):
                Inside(port, key, f"{other.get_name()} {other.get_base64()}", PATIENCE)
        finally:
            over.set()
            runs.join(60)
    with pytest.raises(NoAnswer, match=r"cannot be reached over SSH: .*refused"):
        Inside(port, key, host_key, PATIENCE)


def test_all_of_it(images: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From L1's first instruction until it is switched off; L1's KVM has counted as many exits as were seen."""
    target = tmp_path / "out.json"
    assert cli.main(["observe", "linux", "--logs", str(tmp_path / "logs"), "--json", str(target)]) == 0
    assert "L1's own KVM counts" in capsys.readouterr().out
    assert json.loads(target.read_text())["totals"]["vmruns"] > 5000
    logs = {path.name: path.read_text(errors="replace") for path in (tmp_path / "logs").iterdir()}
    assert logs["l2-console.log"].count("L2: memory is right") == 3 and "Restarting system" in logs["l2-console.log"]
    assert "L1: KVM is there" in logs["l1-console.log"] and "Nested Paging enabled" in logs["l1-dmesg.log"]
    assert "l2-qemu.log" in logs


def test_an_observation_that_is_not_whole() -> None:
    assert counted("exits:20\n/sys/x/pages_sharing:3\n", 20) == {"exits": 20, "pages_sharing": 3, "seen": 20}
    with pytest.raises(NoAnswer, match="has run L2 20 times, and 19 VMRUNs were seen"):
        counted("exits:20\n", 19)


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["observe", "--kernel", "none", "--logs", "logs"]) == 2
    assert "--logs is for observe linux" in capsys.readouterr().err
    assert cli.main(["observe", "linux", "--audit"]) == 2
    assert "--audit are for --machine kvm-on-tcg" in capsys.readouterr().err
