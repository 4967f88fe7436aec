"""KVM's side of nested paging, as its kernel tells it: tracepoints, and one probe where KVM runs a guest.

The probe (a kprobe event on svm_vcpu_run) reads which MMU context the vCPU is in at every entry of the
processor into L1 or L2, from `vcpu->arch.mmu` and the VMCB in use; where their members lie is looked up
in the kernel's own type information. Nothing is patched, and no version is assumed: fields and bits
are found by name.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Protocol

from harness.errors import MachineLost
from harness.machine import ring
from harness.machine.btf import Btf
from harness.model.mmu_context import Capability
from harness.wire.trace import Entry, Event, InUse, NewPage, Vmexit, Vmrun

TRACEFS: Final = "/sys/kernel/tracing"
_TYPES: Final = "/sys/kernel/btf"
_RING_KB: Final = 4096
"""Some 10,000 VMRUNs' worth: the reader lags by milliseconds."""

_ARGUMENTS: Final = ("mmu", "walk_mmu", "root_hpa", "root", "role", "walked", "vmcb", "vmcb02", "hardware_root")
_MMUS: Final = ("root_mmu", "guest_mmu", "nested_mmu")
_PUNCH_HOLE_KEEP_SIZE: Final = 3
_KEPT: Final = 1 << 20
_QUIET: Final = 0.2


class Place(NamedTuple):
    """Where in tracefs KVM is traced: the folder of an instance or, as the default, all of it; and the group of the
    probe, which is known by its name everywhere."""

    folder: str = TRACEFS
    group: str = "twinwalk"


WHOLE: Final = Place()


class Unobservable(Exception):
    """This kernel does not tell what contexts it is in; the message says why."""


class Files(Protocol):
    """The files of the kernel under test."""

    def read(self, path: str) -> bytes:
        """The whole of a file. Raises FileNotFoundError, or MachineLost."""

    def follow(self, path: str) -> None:
        """Copy what comes from `path` to the stream, from now on."""

    def write(self, path: str, text: str) -> None:
        """Raises OSError with the kernel's reason, or MachineLost."""


class Bits(NamedTuple):
    """Bit-fields of a word by name: the first bit, and a mask as wide as the field. `access`, which has three bits
    or since 7.1 four, is told by `access_all` too: whether all are set."""

    fields: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, types: Btf, name: str) -> Bits:
        """Those of the structure or union `name`. Raises KeyError if there is none."""
        members = types.members(types.struct(name))
        return cls(tuple((n, m.bit, (1 << m.width) - 1) for n, m in members.items() if m.width < 32))

    def decode(self, word: int) -> dict[str, int]:
        """The fields of a word, by name."""
        out = {name: word >> bit & mask for name, bit, mask in self.fields}
        for name, bit, mask in self.fields:
            if name == "access":
                out["access_all"] = int(word >> bit & mask == mask)
        return out


class Probe:
    """The probe for the kernel that `types` describes: its definition, and what its values mean.

    Raises KeyError, naming it, for a member that this kernel does not have."""

    def __init__(self, types: Btf, tdp_usable: bool, group: str = WHOLE.group) -> None:
        def at(name: str, path: str) -> int:
            return types.member(name, path).offset

        if at("vcpu_svm", "vcpu"):
            raise KeyError("struct vcpu_svm: vcpu is not its first member")
        vcpu = {name: at("kvm_vcpu", f"arch.{name}") for name in ("mmu", "walk_mmu", *_MMUS)}
        mmu = {name: at("kvm_mmu", path) for name, path in (
            ("root_hpa", "root.hpa"), ("root", "root.pgd"), ("role", "root_role"), ("walked", "cpu_role"))}
        vmcb = at("vcpu_svm", "vmcb")
        hardware = at("vmcb", "control.nested_cr3" if tdp_usable else "save.cr3")
        values = {
            "vcpu": "%di:x64",
            "mmu": f"+{vcpu['mmu']}(%di):x64",
            "walk_mmu": f"+{vcpu['walk_mmu']}(%di):x64",
            **{name: f"+{offset}(+{vcpu['mmu']}(%di)):x{32 if name == 'role' else 64}" for name, offset in mmu.items()},
            "vmcb": f"+{vmcb}(%di):x64",
            "vmcb02": f"+{at('vcpu_svm', 'nested.vmcb02.ptr')}(%di):x64",
            "hardware_root": f"+{hardware}(+{vmcb}(%di)):x64",
        }
        self.definition = f"p:{group}/run svm_vcpu_run " + " ".join(f"{n}={v}" for n, v in values.items())
        self._names = {vcpu[name]: name for name in _MMUS}
        self.role = Bits.of(types, "kvm_mmu_page_role")
        self._seen: dict[tuple[int, ...], InUse] = {}

    def context(self, vcpu: int, *values: int) -> InUse:
        """What the probe's values say; most entries are like one before."""
        key = (vcpu, *values)
        found = self._seen.get(key)
        if found is None:
            mmu, walk_mmu, root_hpa, root, role, walked, vmcb, vmcb02, hardware_root = values
            found = InUse(
                vmcb == vmcb02, self._names.get(mmu - vcpu, "?"), self._names.get(walk_mmu - vcpu, "?"),
                root, root_hpa, hardware_root, self.role.decode(role), self.role.decode(walked & 0xFFFF_FFFF),
            )
            if len(self._seen) > 4096:
                self._seen.clear()
            self._seen[key] = found
        return found


class Decoder:
    """Makes values of raw events. `formats` has the `format` file of each event by its name."""

    def __init__(self, formats: Mapping[str, str], probe: Probe) -> None:
        self._make: dict[int, Callable[[int, bytes], Event]] = {}
        self._probe = probe
        for name, text in formats.items():
            form = ring.Format(text)
            self._make[form.id] = getattr(self, f"_{_MAKERS[name]}")(form)

    def decode(self, raw: ring.Raw) -> Event | None:
        """The value of an event; None for one of another kind."""
        make = self._make.get(raw.id)
        return make(raw.time, raw.data) if make else None

    def _vmrun(self, form: ring.Format) -> Callable[[int, bytes], Event]:
        if "guest_pgd" in form.fields:
            read = form.reader("vmcb", "nested_rip", "tdp_enabled", "guest_pgd").unpack_from

            def make(time: int, data: bytes) -> Event:
                vmcb, rip, np_enable, root = read(data)
                return Vmrun(time, vmcb, rip, bool(np_enable), root)
        else:  # before 5.19
            read = form.reader("vmcb", "nested_rip", "npt").unpack_from

            def make(time: int, data: bytes) -> Event:
                vmcb, rip, np_enable = read(data)
                return Vmrun(time, vmcb, rip, bool(np_enable), None)
        return make

    def _vmexit(self, form: ring.Format) -> Callable[[int, bytes], Event]:
        read = form.reader("exit_code", "exit_info1", "exit_info2").unpack_from
        return lambda time, data: Vmexit(time, *read(data))

    def _entry(self, form: ring.Format) -> Callable[[int, bytes], Event]:
        read, context = form.reader("vcpu", *_ARGUMENTS).unpack_from, self._probe.context
        return lambda time, data: Entry(time, context(*read(data)))

    def _page(self, form: ring.Format) -> Callable[[int, bytes], Event]:
        read, bits = form.reader("gfn", "role", "created").unpack_from, self._probe.role

        def make(time: int, data: bytes) -> Event:
            gfn, role, created = read(data)
            return NewPage(time, gfn, bits.decode(role), bool(created))
        return make


_MAKERS: Final = {"kvm_nested_vmenter": "vmrun", "kvm_nested_vmrun": "vmrun", "kvm_nested_vmexit_inject": "vmexit",
                  "run": "entry", "kvm_mmu_get_page": "page"}
_GROUPS: Final = ("kvm", "kvmmmu")


class Trace:
    """The running trace of L0's CPU number `cpu`, the only one that runs L1. `stream` is a file that what comes from
    its ring is appended to, behind this reader's back. Raises Unobservable."""

    def __init__(self, files: Files, stream: int, lost: Callable[[str], MachineLost], place: Place = WHOLE,
                 cpu: int = 0) -> None:
        self._files, self._place = files, place
        self._stream = stream
        self._lost = lost
        self._at = self._freed = 0
        self.capability = capability(files)
        try:
            probe = Probe(_types(files), self.capability.tdp_usable, place.group)
        except KeyError as missing:
            raise Unobservable(f"in its type information there is no {missing.args[0]}") from None
        self._write(f"{TRACEFS}/kprobe_events", probe.definition)
        formats = self._formats()
        header = files.read(f"{TRACEFS}/events/header_page").decode()
        self._start, room = ring.data_size(header)
        self._page = self._start + room
        self._decoder = Decoder({name: text for name, (_, text) in formats.items()}, probe)
        self._write(f"{place.folder}/buffer_size_kb", str(_RING_KB))
        for name, (group, _) in formats.items():
            self._write(f"{place.folder}/events/{group}/{name}/enable", "1")
        files.follow(f"{place.folder}/per_cpu/cpu{cpu}/trace_pipe_raw")

    def _formats(self) -> dict[str, tuple[str, str]]:
        """Group and format of each event that this kernel has of those in _MAKERS."""
        found = {}
        for name in _MAKERS:
            for group in (*_GROUPS, self._place.group):
                try:
                    found[name] = group, self._files.read(f"{TRACEFS}/events/{group}/{name}/format").decode()
                except FileNotFoundError:
                    continue
        for name in ("kvm_nested_vmexit_inject", "run"):
            if name not in found:
                raise Unobservable(f"it has no trace event {name}")
        return found

    def _write(self, path: str, text: str) -> None:
        try:
            self._files.write(path, text)
        except OSError as reason:
            raise Unobservable(f"it does not take {text!r} in {path}: {reason}") from None

    def pause(self) -> None:
        """Trace no more, and forget what was traced and not yet read."""
        self._write(f"{self._place.folder}/tracing_on", "0")
        self._write(f"{self._place.folder}/trace", "")
        size = -1
        while size != (now := os.fstat(self._stream).st_size):
            size = now
            time.sleep(_QUIET)
        self._at = size // self._page * self._page

    def resume(self) -> None:
        """Trace again: the first events are those of L1, which waits."""
        self._write(f"{self._place.folder}/tracing_on", "1")

    def poll(self) -> list[Event]:
        """Events that have come since the last call, in order. Raises MachineLost if any were lost."""
        out: list[Event] = []
        decode = self._decoder.decode
        while len(page := os.pread(self._stream, self._page, self._at)) == self._page:
            self._at += self._page
            try:
                for raw in ring.events(page, self._start):
                    if (event := decode(raw)) is not None:
                        out.append(event)
            except ring.Lost as lost:
                raise self._lost(f"the trace lost {lost} events: what KVM did cannot be followed") from None
            except (ValueError, struct.error) as reason:
                raise self._lost(f"the trace cannot be read: {reason}") from None
        if self._at - self._freed > _KEPT:
            self._free()
        return out

    def _free(self) -> None:
        """Give back the memory of what was read, of a file that has only memory."""
        libc = ctypes.CDLL(None)
        libc.fallocate(self._stream, _PUNCH_HOLE_KEEP_SIZE, ctypes.c_long(self._freed),
                       ctypes.c_long(self._at - self._freed))
        self._freed = self._at


def capability(files: Files) -> Capability:
    """What this L0 can do: kvm_amd's parameter npt; la57 in /proc/cpuinfo is there only if the kernel uses it. Raises
    Unobservable."""
    try:
        npt = files.read("/sys/module/kvm_amd/parameters/npt").strip() in (b"1", b"Y")
    except FileNotFoundError:
        raise Unobservable("kvm_amd is not loaded") from None
    return Capability(npt, 5 if b" la57 " in files.read("/proc/cpuinfo").replace(b"\n", b" ") else 4)


def _types(files: Files) -> Btf:
    try:
        return Btf.of_module(files.read(f"{_TYPES}/vmlinux"), files.read(f"{_TYPES}/kvm_amd"))
    except FileNotFoundError:
        raise Unobservable("it has no type information of kvm_amd (BTF of modules, since 5.11)") from None
    except ValueError as reason:
        raise Unobservable(f"its type information cannot be read: {reason}") from None
