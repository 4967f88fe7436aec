"""KVM of L0 as it lies in L0's memory: which tables it runs L1 and L2 on, and what it knows of them.

Its structures are found from the vCPU, whose address a kprobe tells once; where members lie is looked up in the
kernel's type information. From then on all is read in place, while L1 stands still: no exit, no trace, no stop.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from typing import Final, Protocol

from harness.machine.btf import Btf
from harness.machine.trace import TRACEFS, Bits, Unobservable
from harness.model.backing import Kvm, Shape, Slot, Table, look_up
from harness.model.entries import FRAME
from harness.model.memory import Memory

_EVENT: Final = "vcpu"
_FOLDER: Final = f"{TRACEFS}/instances/twinwalk"
_READONLY: Final = 1 << 1
"""KVM_MEM_READONLY."""
_MOST: Final = 1 << 16
"""Tables, or slots, that a kernel may have before what was read is taken for none."""
_LETTERS: Final = {8: "B", 16: "H", 32: "I", 64: "Q"}
_STITCHED: Final = ("pae_root", "pml4_root", "pml5_root")


class Shell(Protocol):
    """See harness.machine.l0.L0."""

    def try_run(self, script: str) -> tuple[int, bytes, bytes]:
        """Exit status, stdout and stderr of a script of shell."""


class L0Kvm:
    """Reads L0's `memory`. `begin` is a line of shell that starts L1, where it does not run yet. Raises Unobservable,
    saying why, for a kernel in which it cannot find its way."""

    def __init__(self, host: Shell, memory: Memory, maxphyaddr: int, levels: int, begin: str = "") -> None:
        self.memory = memory
        self.shape = Shape(maxphyaddr, levels)
        self.shadow_format, self.host_format = self.shape.formats()
        try:
            kvm, amd = _types(host)
            places = {name: kvm.member("kvm", path).offset for name, path in (
                ("mm", "mm"), ("slots", "memslots"), ("tables", "arch.active_mmu_pages"))}
            vm, mm = kvm.member("kvm_vcpu", "kvm").offset, places["mm"]
            pgd = kvm.member("mm_struct", "pgd").offset
            told = _ask(host, f"vcpu=%di:x64 kvm=+{vm}(%di):x64 pgd=+{pgd}(+{mm}(+{vm}(%di))):x64 "
                              "offset=@page_offset_base:x64", begin)
            self._offset, self._page_map = told["offset"], told["pgd"] - told["offset"]
            self._svm = self._physical(told["vcpu"])
            self._slots_at = self._physical(told["kvm"] + places["slots"])
            self._list = told["kvm"] + places["tables"]
            self._list_at = self._physical(self._list)
            self._svm_fields = {name: amd.member("vcpu_svm", path).offset for name, path in (
                ("vmcb01", "vmcb01.ptr"), ("vmcb02", "nested.vmcb02.ptr"))}
            self._ncr3 = amd.member("vmcb", "control.nested_cr3").offset
            guest_mmu = amd.member("kvm_vcpu", "arch.guest_mmu").offset
            self._stitched = [guest_mmu + amd.member("kvm_mmu", name).offset for name in _STITCHED]
            self._page = _Fields(kvm, "kvm_mmu_page", "link", "unsync", "role", "gfn", "spt")
            self._slot = _Fields(kvm, "kvm_memory_slot", "base_gfn", "npages", "userspace_addr", "flags")
            self._node_at = kvm.member("kvm_memory_slot", "gfn_node").offset
            self._slots_fields = _Fields(kvm, "kvm_memslots", "generation", "gfn_tree", "node_idx")
            self._tree = _Fields(kvm, "rb_node", "rb_right", "rb_left")
            self._node_size = kvm.size(kvm.struct("rb_node"))
            self._role = Bits.of(kvm, "kvm_mmu_page_role")
        except KeyError as missing:
            raise Unobservable(f"in its type information there is no {missing.args[0]}") from None
        except ValueError as reason:
            raise Unobservable(str(reason)) from None
        self._slots: tuple[tuple[int, ...], tuple[Slot, ...]] = (), ()
        self._table = lru_cache(maxsize=1 << 16)(self._make_table)

    def look(self) -> Kvm:
        """What KVM has now. Raises ValueError for what makes no sense: L1 does not stand still, or this is no KVM that
        this reader knows."""
        try:
            root = self._root_of("vmcb01"), self._root_of("vmcb02")
            return Kvm(*root, self._page_map, self._memory_slots(), dict(self._tables()), frozenset(
                self._physical(at) for at in (self._word(self._svm + offset) for offset in self._stitched) if at))
        except (IndexError, struct.error) as reason:
            raise ValueError(f"KVM's structures lead out of L0's memory: {reason}") from None

    def _word(self, physical: int) -> int:
        return self.memory.words[physical >> 3]

    def _physical(self, virtual: int) -> int:
        """The hPA of an address of the kernel's: by its map of all memory, else by its tables."""
        if 0 <= (at := virtual - self._offset) < len(self.memory.bytes):
            return at
        found = look_up(self.memory.words, self.host_format, self._page_map, virtual, [])
        if found is None:
            raise ValueError(f"L0's kernel has no page at {virtual:#x}")
        return found.address

    def _root_of(self, vmcb: str) -> int:
        """nCR3 of a VMCB, 0 if there is none."""
        at = self._word(self._svm + self._svm_fields[vmcb])
        return self._word(self._physical(at) + self._ncr3) & FRAME if at else 0

    def _memory_slots(self) -> tuple[Slot, ...]:
        at = self._word(self._slots_at)
        generation, tree, index = self._slots_fields.read(self.memory, self._physical(at))
        if self._slots[0] != (at, generation):
            found, todo = [], [tree]
            while todo:
                if not (node := todo.pop()):
                    continue
                right, left = self._tree.read(self.memory, self._physical(node))
                todo += [left, right]
                slot = self._physical(node - self._node_at - index * self._node_size)
                first, pages, process, flags = self._slot.read(self.memory, slot)
                found.append(Slot(first << 12, first + pages << 12, process, not flags & _READONLY))
                if len(found) > _MOST:
                    raise ValueError("KVM's memory slots do not end")
            self._slots = (at, generation), tuple(sorted(found))
        return self._slots[1]

    def _tables(self) -> list[tuple[int, Table]]:
        out: list[tuple[int, Table]] = []
        at = self._word(self._list_at)
        while at != self._list:
            at, unsync, role, gfn, spt = self._page.read(self.memory, self._physical(at))
            out.append((self._physical(spt), self._table(unsync, role, gfn)))
            if len(out) > _MOST:
                raise ValueError("the list of KVM's tables does not end")
        return out

    def _make_table(self, unsync: int, role: int, gfn: int) -> Table:
        bits = self._role.decode(role)
        return Table(gfn, bits["level"], bool(bits["direct"]), bool(unsync & 1), bool(bits["invalid"]),
                     bool(bits.get("passthrough")))


class _Fields:
    """Members of a structure that are read together."""

    def __init__(self, types: Btf, name: str, *members: str) -> None:
        found = [(types.member(name, member), number) for number, member in enumerate(members)]
        at, form, order = 0, "<", []
        for member, number in sorted(found):
            width = min(member.width, 64)  # of a list's head or a tree's root: the first pointer
            form += f"{member.offset - at}x{_LETTERS[width]}"
            at = member.offset + width // 8
            order.append(number)
        self._struct = struct.Struct(form)
        self._order = [order.index(number) for number in range(len(members))]

    def read(self, memory: Memory, at: int) -> list[int]:
        values = self._struct.unpack_from(memory.bytes, at)
        return [values[number] for number in self._order]


def _types(host: Shell) -> tuple[Btf, Btf]:
    """Of kvm and of kvm_amd."""
    data = []
    for name in ("vmlinux", "kvm", "kvm_amd"):
        status, output, _ = host.try_run(f"cat /sys/kernel/btf/{name}")
        if status:
            raise Unobservable(f"it has no type information of {name} (BTF of modules, since 5.11)")
        data.append(output)
    try:
        base = Btf(data[0])
        return Btf(data[1], base), Btf(data[2], base)
    except ValueError as reason:
        raise Unobservable(f"its type information cannot be read: {reason}") from None


def _ask(host: Shell, values: str, begin: str) -> dict[str, int]:
    """What a kprobe where KVM enters a guest tells of the first entry, behind `begin`. Where L1 begins by that, it runs
    on meanwhile, to where it and L0 stand still together: the probe is taken away behind the answer, since that may
    take the kernel longer than L1 takes to its first VMRUN."""
    tidy = (f"echo 0 >{_FOLDER}/events/twinwalk/{_EVENT}/enable; rmdir {_FOLDER}; "
            f"echo '-:twinwalk/{_EVENT}' >>kprobe_events")
    status, output, errors = host.try_run(
        f"cd {TRACEFS} && echo 'p:twinwalk/{_EVENT} svm_vcpu_run {values}' >>kprobe_events && mkdir {_FOLDER} && "
        f"echo 1 >{_FOLDER}/events/twinwalk/{_EVENT}/enable && {{ {begin or ':;'} }} && n=0; "
        f"while [ $n -lt 1000 ] && ! grep -q vcpu= {_FOLDER}/trace; do n=$((n+1)); sleep 0.02; done; "
        f"grep vcpu= {_FOLDER}/trace | head -n 1; {f'( {tidy} ) >/dev/null 2>&1 &' if begin else tidy}")
    found = {name: int(value, 16) for name, value in re.findall(r"(\w+)=0x([0-9a-f]+)", output.decode())}
    if status or not {"vcpu", "kvm", "pgd", "offset"} <= found.keys():
        raise Unobservable(f"it does not tell where its vCPU is: {errors.decode(errors='replace').strip() or output!r}")
    return found
