"""Traces of real kernels, read: pages of the ring as KVM filled them while L1 ran L2 on it, with what the same
kernel printed for the same events as the second opinion (tests/machine/traces, one file for each kernel)."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import time
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from harness.errors import MachineLost
from harness.machine import ring
from harness.machine.btf import Btf
from harness.machine.guests import build_l0
from harness.machine.trace import TRACEFS, Bits, Decoder, Probe, Trace, Unobservable, capability
from harness.model.mmu_context import Capability
from harness.wire.trace import Entry, Event, NewPage, Vmexit, Vmrun
from tests.machine.test_btf import POINTER, UNION, Builder

TRACES = Path(__file__).parent / "traces"
WITH_TYPES = ("6.1", "6.12", "7.2", "6.1-npt0")
ALL = (*WITH_TYPES, "5.10")


@lru_cache(maxsize=8)
def kernel(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((TRACES / f"linux-{name}.json").read_text())
    data["raw"] = zlib.decompress(base64.b64decode(data["raw"]))
    return data


def types(name: str) -> tuple[bytes, bytes]:
    """BTF with the members where that kernel has them: its own is megabytes."""
    members, base = kernel(name)["members"], Builder()
    u32, u64 = base.integer("unsigned int", 4), base.integer("unsigned long", 8)
    out = Builder(base)
    fields = [(field, u32, width << 24 | bit) for field, (bit, width) in kernel(name)["role"].items()]
    role = out.struct("kvm_mmu_page_role", 4, ("word", u32, 0), *fields, kind=UNION, fields=True)

    def at(struct: str, path: str) -> int:
        return int(members[struct][path]) * 8

    root = out.struct("", 16, *sorted((n, u64, at("kvm_mmu", f"root.{n}") - at("kvm_mmu", "root.pgd"))
                                      for n in ("pgd", "hpa")))
    mmu = out.struct("kvm_mmu", 384, ("root", root, at("kvm_mmu", "root.pgd")), ("root_role", role, at(
        "kvm_mmu", "root_role")), ("cpu_role", u64, at("kvm_mmu", "cpu_role")))
    pointer = out.add(POINTER, "", mmu)
    arch = out.struct("", 6000, *((n, pointer if n in ("mmu", "walk_mmu") else mmu, at("kvm_vcpu", f"arch.{n}"))
                                  for n in ("mmu", "walk_mmu", "root_mmu", "guest_mmu", "nested_mmu")))
    out.struct("kvm_vcpu", 6400, ("arch", arch, 0))
    vmcb02 = at("vcpu_svm", "nested.vmcb02.ptr")
    inner = out.struct("", 16, ("ptr", u64, 0))
    nested = out.struct("", 16, ("vmcb02", inner, 0))
    out.struct("vcpu_svm", 9000, ("vcpu", u64, 0), ("vmcb", u64, at("vcpu_svm", "vmcb")), ("nested", nested, vmcb02))
    control = out.struct("", 1024, ("nested_cr3", u64, at("vmcb", "control.nested_cr3")))
    save = out.struct("", 1024, ("cr3", u64, at("vmcb", "save.cr3") - 0x400 * 8))
    out.struct("vmcb", 4096, ("control", control, 0), ("save", save, 0x400 * 8))
    return base.bytes(), out.bytes()


class Kernel:
    """The files of a kernel, from what was recorded of it."""

    def __init__(self, name: str) -> None:
        self.data = kernel(name)
        self.written: dict[str, str] = {}
        self.followed = ""
        self.refuse = ""
        five = "la57 " if self.data.get("capability", [True, 4])[1] == 5 else ""
        npt = b"Y\n" if self.data.get("capability", [True, 4])[0] else b"N\n"
        self.files: dict[str, bytes] = {
            f"{TRACEFS}/events/header_page": self.data["header_page"].encode(),
            "/sys/module/kvm_amd/parameters/npt": npt,
            "/proc/cpuinfo": f"flags\t\t: svm npt {five}umip\n".encode(),
        }
        if "members" in self.data:
            self.files["/sys/kernel/btf/vmlinux"], self.files["/sys/kernel/btf/kvm_amd"] = types(name)
        for event, text in self.data["formats"].items():
            group = {"run": "twinwalk", "kvm_mmu_get_page": "kvmmmu"}.get(event, "kvm")
            self.files[f"{TRACEFS}/events/{group}/{event}/format"] = text.encode()

    def read(self, path: str) -> bytes:
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]

    def write(self, path: str, text: str) -> None:
        if self.refuse and self.refuse in path:
            raise OSError("Invalid argument")
        self.written[path.removeprefix(f"{TRACEFS}/")] = text

    def follow(self, path: str) -> None:
        self.followed = path


def lost(reason: str) -> MachineLost:
    return MachineLost(reason)


@pytest.fixture
def stream() -> Iterator[int]:
    fd = os.memfd_create("trace")
    yield fd
    os.close(fd)


def everything(name: str, stream: int) -> list[Event]:
    os.write(stream, kernel(name)["raw"])
    return Trace(Kernel(name), stream, lost).poll()


@pytest.mark.parametrize("name", WITH_TYPES)
def test_set_up(name: str, stream: int) -> None:
    """The probe is what that kernel took; all events are enabled; the ring is followed last."""
    files = Kernel(name)
    Trace(files, stream, lost)
    assert files.written["kprobe_events"] == files.data["definition"]
    enabled = {path.split("/")[2] for path, text in files.written.items() if path.endswith("/enable") and text == "1"}
    assert enabled == {"run", "kvm_nested_vmenter", "kvm_nested_vmexit_inject", "kvm_mmu_get_page"}
    assert files.followed == f"{TRACEFS}/per_cpu/cpu0/trace_pipe_raw"


@pytest.mark.parametrize("name", WITH_TYPES)
def test_against_the_kernels_own_text(name: str, stream: int) -> None:
    """Each event's numbers, as the kernel printed them."""
    events, lines, runs = everything(name, stream), list(kernel(name)["text"]), 0
    assert [e.time for e in events] == sorted(e.time for e in events)
    told = {line for line in lines if line.startswith("run: ")}
    rest = iter([line for line in lines if not line.startswith("run: ")])
    for event in events:
        if isinstance(event, Entry):
            runs += 1
            context = event.context
            assert any(f" root_hpa={context.root_hpa:#x} root={context.root:#x} role=" in line
                       and f" hardware_root={context.hardware_root:#x}" in line
                       and (len(set(re.findall(r"vmcb(?:02)?=(\w+)", line))) == 1) == context.guest_mode
                       for line in told), context
        else:
            agrees(event, next(rest), kernel(name)["role"])
    assert next(rest, None) is None
    assert runs == kernel(name)["runs"] > 10


def test_the_oldest_kernel(stream: int) -> None:
    """5.10 has no types of kvm_amd, so no contexts; the tracepoints that it has are read all the same."""
    with pytest.raises(Unobservable, match="no type information of kvm_amd"):
        Trace(Kernel("5.10"), stream, lost)
    data = kernel("5.10")
    decoder = Decoder(data["formats"], Probe(Btf.of_module(*types("6.1")), True))
    lines = list(data["text"])
    pages = [data["raw"][at : at + 4096] for at in range(0, len(data["raw"]), 4096)]
    events = [decoder.decode(raw) for page in pages for raw in ring.events(page)]
    known = [event for event in events if event is not None]
    assert len(known) == len(lines) > 50
    for event, line in zip(known, lines, strict=True):
        agrees(event, line, kernel("6.1")["role"])


def agrees(event: Event, line: str, role: dict[str, list[int]]) -> None:
    numbers = {name: int(text, 16) for name, text in re.findall(r"(\w+): (0x[0-9a-f]+)", line)}
    match event:
        case Vmrun(_, vmcb, rip, np_enable, root):
            assert line.startswith(("kvm_nested_vmenter: ", "kvm_nested_vmrun: "))
            assert (vmcb, rip) == (numbers["vmcb"], numbers["nested_rip" if "nested_rip" in numbers else "nrip"])
            assert np_enable == bool(re.search(r"nested_npt=y|npt: on", line))
            assert root == numbers.get("nested_cr3" if np_enable else "guest_cr3")
        case Vmexit(_, exitcode, info1, info2):
            assert line.startswith("kvm_nested_vmexit_inject: ")
            assert (info1, info2) == (numbers["ext_inf1"], numbers["ext_inf2"])
            names = {0x400: "npf", 0x81: "hypercall"}
            assert f"reason: {names[exitcode]} " in line
        case NewPage(_, gfn, bits, created):
            found = re.fullmatch(r"kvm_mmu_get_page: sp gen \d+ gfn ([0-9a-f]+) l(\d) (\d)-byte q(\d)( direct)? "
                                 r"(\S+) (!?nxe) (!?ad) root -?\d+ (un)?sync (new|existing)", line)
            assert found, line
            assert (gfn, bits["level"], created) == (int(found[1], 16), int(found[2]), found[10] == "new")
            assert bits["direct"] == bool(found[5])
            assert bits["access_all"] == ("-" not in found[6] and len(found[6]) == role["access"][1])
            assert bits["efer_nx"] == (found[7] == "nxe")
        case _:
            raise AssertionError(event)


@pytest.mark.parametrize(
    ("name", "in_l2"),
    [
        ("6.1", {("guest_mmu", "nested_mmu", 0, 5, 1), ("root_mmu", "root_mmu", 1, 5, 0)}),
        ("6.12", {("guest_mmu", "nested_mmu", 0, 5, 1), ("root_mmu", "root_mmu", 1, 5, 0)}),
        ("7.2", {("guest_mmu", "nested_mmu", 0, 5, 1), ("root_mmu", "root_mmu", 1, 5, 0)}),
        ("6.1-npt0", {("root_mmu", "root_mmu", 0, 4, 0)}),
    ],
)
def test_the_contexts_of_l2(name: str, in_l2: set[tuple[object, ...]], stream: int) -> None:
    """With and without nested paging; on a host without it, a shadow of L2's own tables."""
    contexts = [event.context for event in everything(name, stream) if isinstance(event, Entry)]
    seen = {(c.mmu, c.walk_mmu, c.role["direct"], c.role["level"], c.role["passthrough"])
            for c in contexts if c.guest_mode}
    assert seen == in_l2
    assert all(c.role["guest_mode"] == c.guest_mode for c in contexts)
    assert all(c.hardware_root == c.root_hpa for c in contexts)
    assert {c.mmu for c in contexts if not c.guest_mode} == {"root_mmu"}


def test_a_stream_that_grows(stream: int) -> None:
    """Only whole pages are read, each once; memory of what was read is given back."""
    raw = kernel("6.1")["raw"]
    whole = everything("6.1", stream)
    trace = Trace(Kernel("6.1"), fresh := os.memfd_create("grows"), lost)
    try:
        got: list[Event] = []
        for start in range(0, len(raw), 1000):
            os.write(fresh, raw[start : start + 1000])
            got += trace.poll()
        assert got == whole
        assert trace.poll() == []
        blocks = os.fstat(fresh).st_blocks
        for _ in range(1 + (2 << 20) // len(raw)):
            os.write(fresh, raw)
        assert len(trace.poll()) > len(whole)
        assert os.fstat(fresh).st_blocks <= blocks
    finally:
        os.close(fresh)


def test_what_came_before_a_pause_is_forgotten(stream: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.machine.trace._QUIET", 0.001)
    files, raw = Kernel("6.1"), kernel("6.1")["raw"]
    trace = Trace(files, stream, lost)
    os.write(stream, raw[: 3 * 4096])
    trace.pause()
    assert (files.written["tracing_on"], files.written["trace"]) == ("0", "")
    os.write(stream, raw[3 * 4096 :])
    trace.resume()
    assert files.written["tracing_on"] == "1"
    later = trace.poll()
    assert later == everything("6.1", stream)[-len(later) :]
    assert 0 < len(later) < kernel("6.1")["runs"]


def test_the_program_that_follows(tmp_path: Path) -> None:
    """It copies what there is, waits for more, and says what it cannot do."""
    ring_file, port = tmp_path / "ring", tmp_path / "port"
    pages = kernel("6.1")["raw"]
    ring_file.write_bytes(pages)
    port.touch()
    with subprocess.Popen([build_l0("follow"), ring_file, port]) as program:
        try:
            for more in (b"", pages[:4096] * 40):
                with ring_file.open("ab") as file:
                    file.write(more)
                end = time.monotonic() + 60
                while port.stat().st_size < ring_file.stat().st_size and time.monotonic() < end:
                    time.sleep(0.005)
                assert port.read_bytes() == ring_file.read_bytes()
            assert program.poll() is None
        finally:
            program.kill()
    for arguments, reason in (([ring_file], b"follow TRACE_PIPE_RAW PORT"), ([tmp_path / "no", port], b"cannot open"),
                              ([tmp_path, port], b"cannot read")):
        done = subprocess.run([build_l0("follow"), *arguments], capture_output=True, timeout=60, check=False)
        assert done.returncode == 1
        assert reason in done.stderr


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda page: page[:8] + (int.from_bytes(page[8:16], "little") | 1 << 31).to_bytes(8, "little") + page[16:],
         "the trace lost an unknown number of events"),
        (lambda page: page[:8] + (4090).to_bytes(8, "little") + page[16:], "the trace cannot be read: a ring page"),
        (lambda page: page[:16] + b"\x1c" + page[17:200].replace(page[17:200], bytes(183)) + page[200:],
         "the trace cannot be read"),
    ],
)
def test_events_that_are_lost(spoil: Any, reason: str, stream: int) -> None:
    """An overrun of the ring, and a page that is damaged: the machine is lost, nothing is passed over."""
    raw = kernel("6.1")["raw"]
    trace = Trace(Kernel("6.1"), stream, lost)
    os.write(stream, raw[:4096] + spoil(raw[4096:8192]) + raw[8192:])
    with pytest.raises(MachineLost, match=reason):
        trace.poll()


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("events/twinwalk/run/format", "no trace event run"),
        ("events/kvm/kvm_nested_vmexit_inject/format", "no trace event kvm_nested_vmexit_inject"),
    ],
)
def test_a_kernel_without_an_event(missing: str, reason: str, stream: int) -> None:
    files = Kernel("6.1")
    del files.files[f"{TRACEFS}/{missing}"]
    with pytest.raises(Unobservable, match=reason):
        Trace(files, stream, lost)


def test_a_kernel_that_takes_no_probe(stream: int) -> None:
    files = Kernel("6.1")
    files.refuse = "kprobe_events"
    with pytest.raises(Unobservable, match=r"does not take 'p:twinwalk/run .*' in \S+/kprobe_events: Invalid"):
        Trace(files, stream, lost)


@pytest.mark.parametrize(
    ("vmlinux", "reason"), [(b"\x7fELF" + bytes(99), "cannot be read"), (None, "no struct vcpu_svm")]
)
def test_types_that_are_none(vmlinux: bytes | None, reason: str, stream: int) -> None:
    """Damaged ones, and those of a kernel that calls its structures otherwise."""
    files = Kernel("6.1")
    empty = Builder()
    files.files["/sys/kernel/btf/vmlinux"] = empty.bytes() if vmlinux is None else vmlinux
    files.files["/sys/kernel/btf/kvm_amd"] = Builder(empty).bytes()
    with pytest.raises(Unobservable, match=reason):
        Trace(files, stream, lost)


@pytest.mark.parametrize(
    ("npt", "flags", "wanted"),
    [(b"Y\n", b"npt la57 x", (True, 5)), (b"1\n", b"npt", (True, 4)), (b"N\n", b"la57x", (False, 4)),
     (b"0\n", b"x\nflags: la57 \n", (False, 5))],
)
def test_capability(npt: bytes, flags: bytes, wanted: tuple[bool, int]) -> None:
    files = Kernel("6.1")
    files.files |= {"/sys/module/kvm_amd/parameters/npt": npt, "/proc/cpuinfo": flags}
    assert capability(files) == Capability(*wanted)


def test_access_in_words() -> None:
    bits = Bits((("level", 0, 15), ("access", 8, 7)))
    assert bits.decode(0x704) == {"level": 4, "access": 7, "access_all": 1}
    assert bits.decode(0x304)["access_all"] == 0
