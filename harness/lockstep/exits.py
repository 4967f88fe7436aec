"""What one #VMEXIT of any hypervisor's guest must be, by the VMCB, the tables as they are, and the state before.

Nothing is known of what L2 did but how it left. So a fault is walked once more: it must end in the same fault, bit for
bit. Where an instruction made L2 leave, its fetch must go through, and have left its accessed bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from harness.lockstep.active import Active
from harness.lockstep.compare import Divergence, differing_fields
from harness.lockstep.evidence import Touched
from harness.lockstep.prediction import WHOLE
from harness.lockstep.result import Under
from harness.model.access import Access, ErrorCode, NestedPageFault, Outcome, PageFault, Reached
from harness.model.dirty import NESTED_TABLE
from harness.model.entries import FRAME, P
from harness.model.events import EVENT_VALID, EXCEPTION, INTERRUPT, NMI, SOFTWARE
from harness.model.memory import Memory, Words
from harness.model.registers import CR0, CR4, EFER, RFLAGS, Cpu
from harness.model.vmcb import SAVE, SEGMENT_L, STATE, ExitCode, VIntr, Vmcb
from harness.model.vmrun import LOADED, Host, Registers, load, paging
from harness.model.walk import FINAL, Fault, Paging, Trail, Walk, translate, walk_nested
from harness.wire.layout import CONTROL_BYTES, SAVE_BYTES
from harness.wire.stop import NOWHERE, Stop

_PF: Final = ExitCode.EXCEPTION + 14
_TABLE: Final = Access(write=True, user=True)
_PAGE_SHIFT: Final = 12
_LONGEST: Final = 15
"""Bytes of an instruction."""
_BY_INSTRUCTION: Final = frozenset((*range(0x40), *range(0x65, 0x7D), *range(0x80, 0x8F)))
"""Exit codes of instructions that L2 executes: CR and DR accesses, and those from CR0_SEL_WRITE on."""
_OWN: Final = dict.fromkeys((
    "exitcode", "exitinfo1", "exitinfo2", "exitintinfo", "interrupt_shadow", "eventinj", "nrip", "fetched_count",
    "fetched_bytes"), WHOLE) | {"v_intr": VIntr.TPR | VIntr.IRQ | 0x1E00}
"""Of the control area, what #VMEXIT writes: 12:9 of V_INTR are V_GIF and the virtual NMI's."""
_SAVED_SEGMENTS: Final = tuple(
    f"{name}.{part}" for name in ("es", "cs", "ss", "ds", "gdtr", "idtr")
    for part in ("selector", "attrib", "limit", "base"))
_SAVED: Final = _OWN | dict.fromkeys((
    *LOADED, *_SAVED_SEGMENTS, "s_cet", "ssp", "isst_addr", "debugctl", "br_from", "br_to", "last_excp_from",
    "last_excp_to"), WHOLE)
_ANY_STATE: Final = _OWN | dict.fromkeys(STATE, WHOLE)
_EVENT_TYPES: Final = (INTERRUPT, NMI, EXCEPTION, SOFTWARE)
_HAS_ERROR: Final = 1 << 11


class Entered(NamedTuple):
    """A VMRUN: its number, the VMCB as it was, the rules it broke, the stop with L1's registers, its paging."""

    number: int
    vmcb: int
    control: bytes
    save: bytes
    broken: tuple[str, ...]
    stop: Stop
    host: Host
    under: Under


class Exit(NamedTuple):
    """A #VMEXIT, to be judged: the VMRUN before it, and memory as it is now."""

    name: str
    entered: Entered
    vmcb: Vmcb
    memory: Memory | Touched
    cpu: Cpu
    holds: bool = False
    """The machine may hold translations over VMRUN and #VMEXIT: A and D may have been set before."""

    def found(self, check: str, field: str, expected: int | str, observed: int | str, rule: str,
              walk: Walk | None = None) -> Divergence:
        """A divergence of this stop, with the entries of `walk` as they are in memory now."""
        after = () if walk is None else tuple(self._entry(step[3], step[4]) for step in walk.trail)
        return Divergence(self.name, self.entered.number, -1, check, field, expected, observed, rule, walk, after)

    def _entry(self, address: int, as_read: int) -> int:
        try:
            return self.memory.words[address >> 3] if address & 7 == 0 else as_read
        except IndexError:
            return as_read


def halves(vmcb: Vmcb) -> tuple[bytes, bytes]:
    """The control area and the state-save area, as far as they have fields."""
    at = vmcb.address
    return bytes(vmcb.bytes[at : at + CONTROL_BYTES]), bytes(vmcb.bytes[at + SAVE : at + SAVE + SAVE_BYTES])


def page(entered: Entered) -> bytes:
    """The page of the VMCB as it was at that VMRUN, zeros where it has no fields."""
    data = bytearray(4096)
    data[: len(entered.control)] = entered.control
    data[SAVE : SAVE + len(entered.save)] = entered.save
    return bytes(data)


def refusal(it: Exit, quirks: Active) -> Iterator[Divergence]:
    """VMRUN is refused exactly where the manual refuses it."""
    code = it.vmcb["exitcode"]
    rule = quirks.on_refusal(it.entered.broken, it.vmcb, it.entered.host)
    if (code == ExitCode.INVALID) == bool(rule):
        return
    info1, info2 = it.vmcb["exitinfo1"], it.vmcb["exitinfo2"]
    yield it.found("C3", "outcome", "VMEXIT_INVALID" if rule else "L2 runs",
                   f"{ExitCode.describe(code)}, EXITINFO1 {info1:#x}, EXITINFO2 {info2:#x}",
                   rule or "vmrun.legal")


def was_refused(code: int) -> bool:
    """VMEXIT_INVALID, or the half of it that some machines write."""
    return code & 0xFFFF_FFFF == 0xFFFF_FFFF


def outcome(it: Exit, quirks: Active) -> Iterator[Divergence]:
    """A fault is one by the tables; an instruction that was executed could be fetched. Raises IndexError where a walk
    leads out of L1's memory."""
    vmcb, code = it.vmcb, it.vmcb["exitcode"]
    regs = load(vmcb, it.entered.host)
    translation, changed = quirks.on_paging(paging(regs, vmcb, it.entered.host, it.cpu))
    quirks.use(changed)
    if code == ExitCode.NPF and translation.nested is not None:
        yield from _nested_fault(it, quirks, translation)
        info = vmcb["exitinfo1"]
        if info & ErrorCode.ID and info & ErrorCode.FINAL and not vmcb["exitintinfo"] & EVENT_VALID:
            yield from _fetch_fault(it, quirks, translation, regs)
    elif code == _PF:
        yield from _page_fault(it, quirks, translation, regs)
    elif code in _BY_INSTRUCTION and not vmcb["exitintinfo"] & EVENT_VALID:
        yield from _executed(it, quirks, translation, regs)


def _nested_fault(it: Exit, quirks: Active, translation: Paging) -> Iterator[Divergence]:
    """The nested walk of EXITINFO2 (15.25.6)."""
    assert translation.nested is not None
    code, gpa = it.vmcb["exitinfo1"], it.vmcb["exitinfo2"]
    table = bool(code & ErrorCode.GUEST_TABLE)
    access = _TABLE if table else Access(bool(code & ErrorCode.W), bool(code & ErrorCode.ID), bool(code & ErrorCode.U))
    trail: Trail = []
    came: Outcome
    try:
        purpose = translation.guest.levels[-1].name if table and translation.guest is not None else FINAL
        spa = walk_nested(translation, translation.nested, it.memory.words, gpa, access, purpose, trail, [])
        came, rule = Reached(spa, gpa), "reached"
    except Fault as fault:
        came, rule = fault.outcome, fault.rule
    walk = quirks.on_walk(translation, Walk(came, rule, trail, []))
    found = list(_compare(it, walk, NestedPageFault(code, gpa)))
    yield from found
    if table and not found and not has_table(translation, it.memory.words, gpa):
        final = code ^ ErrorCode.GUEST_TABLE | ErrorCode.FINAL
        yield it.found("C1", "exitinfo1", final, code, walk.rule, walk)


def has_table(translation: Paging, words: Words, gpa: int) -> bool:
    """Whether L2 has a table of its own in the page of `gpa`, that its walks can come to."""
    guest = translation.guest
    if guest is None or translation.nested is None:
        return False
    todo, seen = [(translation.gcr3 & guest.root_mask, 0)], set[tuple[int, int]]()
    while todo:
        table, depth = todo.pop()
        if not (table ^ gpa) >> _PAGE_SHIFT:
            return True
        level = guest.levels[depth]
        if level.leaf == P or (table, depth) in seen:
            continue
        seen.add((table, depth))
        try:
            spa = walk_nested(translation, translation.nested, words, table, _TABLE, level.name, [], [])
        except Fault:
            continue  # nor can the processor read it
        entries = min(guest.index_mask + 1, 1 << guest.address_bits - level.shift)
        for at in range(spa, spa + (entries << guest.entry_shift), 1 << guest.entry_shift):
            entry = words[at >> 3] >> (at & (1 << 3 - guest.entry_shift) - 1 << guest.entry_shift) * 8
            if entry & P and not entry & level.leaf:
                todo.append((entry & FRAME & (1 << (8 << guest.entry_shift)) - 1, depth + 1))
    return False


def _fetch_fault(it: Exit, quirks: Active, translation: Paging, regs: Registers) -> Iterator[Divergence]:
    """#NPF for the page of an instruction: that is where L2 stands, or the page that its instruction goes on in."""
    seen = NestedPageFault(it.vmcb["exitinfo1"], it.vmcb["exitinfo2"])
    walks = [_fetch(it, quirks, translation, regs, at) for at in (0, _LONGEST - 1)]
    if not any(isinstance(one.outcome, NestedPageFault) and one.outcome.error_code == seen.error_code
               and one.outcome.address >> 12 == seen.address >> 12 for one in walks):
        yield it.found("C1", "outcome", str(walks[0].outcome), str(seen), walks[0].rule, walks[0])


def _page_fault(it: Exit, quirks: Active, translation: Paging, regs: Registers) -> Iterator[Divergence]:
    """#PF that L1 intercepts: EXITINFO2 is what CR2 would be (15.12.15)."""
    code, gva = it.vmcb["exitinfo1"], it.vmcb["exitinfo2"]
    user = bool(code & ErrorCode.U)
    access = Access(bool(code & ErrorCode.W), bool(code & ErrorCode.ID), user, implicit=not user and regs.cpl == 3,
                    shadow_stack=bool(code & ErrorCode.SS))
    walk = quirks.on_walk(translation, translate(translation, it.memory.words, gva, access))
    yield from _compare(it, walk, PageFault(code, gva))


def _compare(it: Exit, walk: Walk, seen: NestedPageFault | PageFault) -> Iterator[Divergence]:
    came = walk.outcome
    if came == seen:
        return
    if isinstance(came, type(seen)) and came.address == seen.address:
        yield it.found("C1", "exitinfo1", came.error_code, seen.error_code, walk.rule, walk)
    else:
        yield it.found("C1", "outcome", str(came), str(seen), walk.rule, walk)


def _executed(it: Exit, quirks: Active, translation: Paging, regs: Registers) -> Iterator[Divergence]:
    walk = _fetch(it, quirks, translation, regs, 0)
    if not isinstance(walk.outcome, Reached):
        yield it.found("C1", "outcome", str(walk.outcome), ExitCode.describe(it.vmcb["exitcode"]), walk.rule, walk)
        return
    for address, bits, kind in walk.updates:
        # L2's kernel may have cleared the accessed bit of a page of its users, and not flushed it yet
        if it.holds if kind is NESTED_TABLE else regs.cpl == 3:
            continue
        shift = (address & 4) * 8
        entry = it.memory.words[address >> 3]
        if bits & ~(entry >> shift):
            yield it.found("C2", f"entry at sPA {address & ~7:#x}", entry | bits << shift, entry, "ad", walk)


def _fetch(it: Exit, quirks: Active, translation: Paging, regs: Registers, at: int) -> Walk:
    """The fetch of the instruction that L2 stands at, or of a byte further on in it."""
    in_64_bit_mode = regs.efer & EFER.LMA and it.vmcb["cs.attrib"] & SEGMENT_L
    gva = regs.rip + at if in_64_bit_mode else it.vmcb["cs.base"] + regs.rip + at & 0xFFFF_FFFF
    access = quirks.on_access(Access(fetch=True, user=regs.cpl == 3), regs.cpl)
    return quirks.on_walk(translation, translate(translation, it.memory.words, gva, access))


def accessed(it: Exit, quirks: Active, stop: Stop) -> Iterator[Divergence]:
    """A memory access that L2 has made, with its registers as they were then, went where its walk leads, and has left A
    and D in the nested tables (in L2's own its kernel may have cleared them since). Raises IndexError where the walk
    leads out of L1's memory."""
    now, regs = stop.host, load(it.vmcb, it.entered.host)
    regs.cr0, regs.cr3, regs.cr4, regs.efer = now["cr0"], now["cr3"], now["cr4"], now["efer"]
    regs.rflags = now["eflags"]
    regs.cpl = 3 if regs.rflags & RFLAGS.VM else now["cs"] & 3 if regs.cr0 & CR0.PE else 0
    translation, changed = quirks.on_paging(paging(regs, it.vmcb, it.entered.host, it.cpu))
    quirks.use(changed)
    usual = Access(stop.write, user=regs.cpl == 3)
    # one on the side, to a descriptor or through a delivery, is a supervisor's
    walks = [quirks.on_walk(translation, translate(translation, it.memory.words, stop.gva, access))
             for access in (usual, Access(stop.write, implicit=True))]
    same = [one for one in walks if isinstance(one.outcome, Reached) and one.outcome.spa == stop.spa]
    if not same:
        reached = walks[0].outcome
        if stop.spa == NOWHERE and isinstance(reached, Reached) and reached.spa >= len(it.memory.bytes):
            raise IndexError
        observed = "memory that is none of L1's" if stop.spa == NOWHERE else f"sPA {stop.spa:#x}"
        yield it.found("C1", "outcome", str(reached), observed, walks[0].rule, walks[0])
        return
    for address, bits, kind in same[0].updates:
        shift = (address & 4) * 8
        entry = it.memory.words[address >> 3]
        if kind is NESTED_TABLE and not it.holds and bits & ~(entry >> shift):
            yield it.found("C2", f"entry at sPA {address & ~7:#x}", entry | bits << shift, entry, "ad", same[0])


def unchanged(it: Exit) -> Iterator[Divergence]:
    """What #VMEXIT has no business with is as it was: most of the control area, and what VMSAVE saves."""
    control, save = halves(it.vmcb)
    loose = was_refused(it.vmcb["exitcode"]) or it.vmcb["exitcode"] == ExitCode.SHUTDOWN
    free = _ANY_STATE if loose else _SAVED
    if (control, save) != (it.entered.control, it.entered.save):
        for name, want, got in differing_fields((it.entered.control, control), (it.entered.save, save), free):
            yield it.found("C3", name, want, got, "exit.control")


def saved(it: Exit) -> Iterator[Divergence]:
    """What was saved is a state that the processor can be in (15.6, 15.7.2, 15.20)."""
    vmcb = it.vmcb
    if was_refused(vmcb["exitcode"]) or vmcb["exitcode"] == ExitCode.SHUTDOWN:
        return
    for name, want in _sane(vmcb):
        if vmcb[name] != want:
            yield it.found("C3", name, want, vmcb[name], "exit.saved")


def _sane(vmcb: Vmcb) -> Iterator[tuple[str, int]]:
    """Fields, and the nearest value that each may have."""
    cr0, cr4, efer, rflags = vmcb["cr0"], vmcb["cr4"], vmcb["efer"], vmcb["rflags"]
    long = bool(efer & EFER.LME and cr0 & CR0.PG)
    yield "eventinj", vmcb["eventinj"] & ~EVENT_VALID
    yield "cr0", cr0 & 0xFFFF_FFFF
    yield "efer", efer & ~EFER.LMA | EFER.SVME | (EFER.LMA if long else 0)
    yield "rflags", rflags & 0x3F_7FD7 | RFLAGS.ONE
    yield "dr6", vmcb["dr6"] & 0xFFFF_FFFF
    yield "dr7", vmcb["dr7"] & 0xFFFF_FFFF
    cpl = vmcb["cpl"]
    yield "cpl", 3 if rflags & RFLAGS.VM and not long else cpl & 3 if cr0 & CR0.PE else 0
    if long and vmcb["cs.attrib"] & SEGMENT_L:
        top = 1 << (56 if cr4 & CR4.LA57 else 47)
        yield "rip", ((vmcb["rip"] & 2 * top - 1) ^ top) - top & (1 << 64) - 1
    event = vmcb["exitintinfo"]
    if event & EVENT_VALID:
        kind = event >> 8 & 7
        yield "exitintinfo", event if kind == EXCEPTION else (event & ~_HAS_ERROR if kind in _EVENT_TYPES else
                                                              event & ~EVENT_VALID)


def host(it: Exit, registers: dict[str, int]) -> Iterator[Divergence]:
    """L1 has its registers back (15.6)."""
    before = it.entered.stop.host
    for name in before.keys() - {"rip"}:
        if before[name] != registers[name]:
            field = "rflags" if name == "eflags" else name
            yield it.found("C3", f"l1.{field}", before[name], registers[name], "exit.host")
