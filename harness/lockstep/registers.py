"""L2's own registers: what its probes read and write of them, and what of the TLB goes with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from harness.errors import UsageError
from harness.lockstep import stub, vm_state
from harness.lockstep.delivery import second_processor
from harness.lockstep.hazards import CR8_WITH_V_IRQ, LEGACY_INVLPG
from harness.lockstep.prediction import WHOLE
from harness.lockstep.quirks import BREAKPOINTS_KEPT, PKE_NOT_FLUSHED
from harness.model import events, tlb_events, vmrun
from harness.model.access import Access, Reached
from harness.model.consistency import cr4_mbz, efer_mbz
from harness.model.events import Event
from harness.model.registers import CR0, CR4, EFER, RFLAGS
from harness.model.vmcb import FIELDS, NP_ENABLE, SEGMENT_P, ExitCode, VIntr
from harness.scenario.ops import VM_STATE

if TYPE_CHECKING:
    from harness.lockstep.l2 import L2

_FLUSHING: Final = {"cr0": CR0.PG, "cr4": CR4.PGE | CR4.PAE | CR4.PSE}
"""Bits whose change flushes all translations, global ones too (section 5.5.3)."""
_EDGES: Final = CR4.PKE | CR4.PCIDE
"""Bits of CR4 of which only one change does: PKE set, PCIDE cleared."""
_IMPLICIT_READ: Final = Access(implicit=True)
_BREAKPOINTS: Final = ("dr0", "dr1", "dr2", "dr3")
_OTHER_NAMES: Final = {"dr4": "dr6", "dr5": "dr7"}
_DR6: Final = FIELDS["dr6"][0] - 0x400
"""Offset in the state-save area."""
_MET: Final = 0xF
"""Bits of DR6: the breakpoints that were met (section 13.1.1.3)."""


def probe(l2: L2, kind: str, address: int, value: int) -> int:
    """Reads and writes of L2's own registers. Raises Leave for what is intercepted or faults, UsageError for what is
    not modelled."""
    regs, vmcb = l2.regs, l2.state.vmcb
    if kind in ("remote", "remotenmi"):
        return second_processor(l2, kind, value)
    if kind in ("rdpkru", "wrpkru"):
        return _pkru(l2, kind, value)
    if kind in VM_STATE:
        return vm_state.do(l2, kind, value)
    if kind in stub.DESCRIPTOR_READS:
        return vmcb[stub.DESCRIPTOR_READS[kind]] & l2.mask
    if kind in stub.LOADED_LIMITS:
        name, limit = stub.LOADED_LIMITS[kind]
        vmcb[f"{name}.base"], vmcb[f"{name}.limit"] = value, limit
        return value
    if kind in stub.SEGMENT_LOADS:
        return _load_segment(l2, stub.SEGMENT_LOADS[kind], value)
    what = _OTHER_NAMES.get(kind[2:], kind[2:])
    if what in _BREAKPOINTS:
        if kind.startswith("rd"):
            return l2.state.written_outside(what)
        l2.state.outside[what] = value  # 15.5.1: no part of what VMRUN and #VMEXIT switch
        return value
    if what == "cr8":
        return _cr8(l2, kind, value)
    if what == "seg" and not l2.state.mode.long:
        return vmcb["cs.selector"] << 16 | vmcb["es.selector"]
    if what == "seg":
        return sum(vmcb[f"{s}.selector"] << 16 * n for n, s in enumerate(("es", "cs", "ss", "ds")))
    if what == "flags":
        if kind == "wrflags":
            pop_flags(l2, value)
            if regs.rflags & RFLAGS.TF:
                l2.single_step("after_wrflags")
            return value
        return regs.rflags & ~RFLAGS.STATUS | stub.FLAGS
    if kind == "invlpg":
        if regs.cr0 & CR0.PG and not regs.efer & EFER.LMA and l2.state.host_at_vmrun().efer & EFER.LMA:
            l2.out.perils.add(LEGACY_INVLPG)
        l2.flush(tlb_events.INVLPG, address)
        return value
    if what == "msr" and address not in stub.MSR_FIELDS:
        raise UsageError(f"L1 must intercept MSR {address:#x}: it is not modelled")
    if what != "msr" and not hasattr(regs, what):
        raise UsageError(f"L1 must intercept {kind.upper()}: what it does inside of L2 is not modelled")
    name = stub.MSR_FIELDS[address] if what == "msr" else what
    own = hasattr(regs, name)
    if kind.startswith("rd"):
        return (int(getattr(regs, name)) if own else vmcb[name]) & l2.mask
    if own:
        write(l2, name, value)
    else:
        vmcb[name] = value
    return value


def pop_flags(l2: L2, value: int) -> None:
    """POPF. Raises UsageError where that lets an interrupt in."""
    regs, vmcb = l2.regs, l2.state.vmcb
    regs.rflags = vmrun.popped(regs, value)
    l2.paging = l2.state.paging(regs)
    l2.ran()
    own = not vmcb["v_intr"] & VIntr.MASKING and regs.rflags & RFLAGS.IF
    if vmrun.virtual_interrupt(vmcb, regs.rflags) is not None or (own and "interrupt" in l2.state.outside):
        raise UsageError("an interrupt that POPF lets in, while it has L2's stack elsewhere, is not modelled")


def write(l2: L2, name: str, value: int) -> None:
    """L2 writes a register that decides over translation. Raises UsageError for a value that this CPU has not."""
    regs, vmcb = l2.regs, l2.state.vmcb
    lacking = {"cr4": cr4_mbz, "efer": efer_mbz}.get(name)
    if lacking is not None and lacking(value, l2.state.cpu):
        raise UsageError(f"L2 cannot write {value:#x} to {name.upper()}: this CPU has no such feature")
    keys_on = name == "cr4" and value ^ regs.cr4 == value & CR4.PKE
    keeps = bool(name == "cr3" and regs.cr4 & CR4.PCIDE and value >> 63)
    value &= ~(keeps << 63)  # 5.5.1: the bit is not stored
    changed = value ^ getattr(regs, name)
    setattr(regs, name, value)
    if name == "g_pat" and not vmcb["np_control"] & NP_ENABLE:
        l2.state.host.pat = value  # 15.25.4: without nested paging L1 and L2 have one PAT
    before, l2.paging = l2.paging, l2.state.paging(regs)
    l2.caching = vmrun.caching(regs, vmcb, l2.state.host)
    if keys_on and l2.state.quirks.has(PKE_NOT_FLUSHED):
        l2.paging = l2.paging._replace(pkru=before.pkru)
    l2.ran()
    if name == "cr3" and not keeps:
        l2.flush(tlb_events.CR3, keeps_global=True)
    elif changed & (_FLUSHING.get(name, 0) | (_EDGES & (value ^ CR4.PCIDE) if name == "cr4" else 0)):
        l2.flush(tlb_events.CR0 if name == "cr0" else tlb_events.CR4)
    l2.enter_again()


def old_breakpoint(l2: L2, address: int, index: int) -> None:
    """By a quirk: L2's fetch meets a breakpoint that L1 had enabled, perhaps in an earlier program. DR6 tells which of
    DR0 to DR3 have that address; what an earlier program left in them is known by DR6 alone."""
    seen, debug, outside = l2.state.seen, ExitCode.EXCEPTION + events.DB, l2.state.outside
    met = sum(1 << n for n, name in enumerate(_BREAKPOINTS) if outside.get(name, address) == address)
    if (met and seen is not None and (seen.next_probe, seen.exitcode) == (index, debug)
            and l2.state.quirks.has(BREAKPOINTS_KEPT)):
        dr6 = int.from_bytes(seen.save[_DR6 : _DR6 + 8], "little")  # L1's own may be its old one
        met &= dr6 | ~sum(1 << n for n, name in enumerate(_BREAKPOINTS) if name not in outside)
        l2.regs.rip, l2.regs.dr6 = address, l2.regs.dr6 & ~_MET | met
        l2.exception(Event.exception(events.DB))


def _cr8(l2: L2, kind: str, value: int) -> int:
    """CR8 is V_TPR with V_INTR_MASKING, and without it L1's own, which writes go to beside V_TPR
    (section 15.21.2)."""
    vmcb = l2.state.vmcb
    own = not vmcb["v_intr"] & VIntr.MASKING
    if own and l2.state.host_mode.narrow:
        raise UsageError("without V_INTR_MASKING CR8 is L1's, which an L1 in a 32-bit mode cannot see")
    if kind == "wrcr8":
        vmcb["v_intr"] = vmcb["v_intr"] & ~VIntr.TPR | value & 0xF
        if vmrun.virtual_interrupt(vmcb, RFLAGS.IF, at_priority=True) is not None:
            l2.out.perils.add(CR8_WITH_V_IRQ)
        if vmrun.virtual_interrupt(vmcb, l2.regs.rflags) is not None:
            raise UsageError("an interrupt that L2 lets in itself is not modelled")
        if own:
            l2.host["cr8"] = value & 0xF
        return value
    return l2.host.get("cr8", l2.state.host.cr8) if own else vmcb["v_intr"] & 0xF


def _load_segment(l2: L2, name: str, selector: int) -> int:
    """MOV to ES or DS: a null selector, or one of a data segment in L2's GDT (section 4.8.1)."""
    vmcb = l2.state.vmcb
    if not selector & ~3:
        load_null(l2, name, selector)
        return selector
    vmcb[f"{name}.selector"] = selector
    walk = l2.access(vmcb["gdtr.base"] + (selector & ~7), _IMPLICIT_READ)
    if not isinstance(walk.outcome, Reached):
        raise UsageError(f"L2 cannot reach the descriptor of {selector:#x}: {walk.outcome}")
    entry = l2.state.memory.words[walk.outcome.spa >> 3]
    if name != "es" or l2.regs.cpl or entry >> 40 & 0xF9 != 0x91 or selector > vmcb["gdtr.limit"]:
        raise UsageError(f"{name} = {selector:#x}: L2 can load ES with an accessed data segment, at CPL 0")
    limit = entry & 0xFFFF | entry >> 32 & 0xF_0000
    vmcb[f"{name}.attrib"] = entry >> 40 & 0xFF | entry >> 44 & 0xF00
    vmcb[f"{name}.limit"] = limit << 12 | 0xFFF if entry >> 55 & 1 else limit
    vmcb[f"{name}.base"] = entry >> 16 & 0xFF_FFFF | entry >> 32 & 0xFF00_0000
    return selector


def load_null(l2: L2, name: str, selector: int) -> None:
    """A null selector, 15.5.1: such a segment has P=0; what else its attributes, limit and base say is not defined."""
    vmcb = l2.state.vmcb
    vmcb[f"{name}.selector"], vmcb[f"{name}.attrib"] = selector, 0
    l2.undefined |= {f"{name}.attrib": ~SEGMENT_P, f"{name}.limit": WHOLE, f"{name}.base": WHOLE}


def _pkru(l2: L2, kind: str, value: int) -> int:
    """RDPKRU and WRPKRU (section 5.6.7): PKRU is one for L1 and L2."""
    if not l2.regs.cr4 & CR4.PKE:
        l2.exception(Event.exception(events.UD))
    host = l2.state.host
    if kind == "wrpkru":
        host.pkru = value & 0xFFFF_FFFF
        l2.paging = l2.state.paging(l2.regs)
        l2.ran()
        return value
    return host.pkru
