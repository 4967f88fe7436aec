"""Instructions of L2 that L1 may intercept: whether it does, and what they do where it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from harness.errors import UsageError
from harness.lockstep import registers, stub
from harness.lockstep.delivery import Leave, physical
from harness.lockstep.hazards import PAE_STEPPED_OVER, PAE_SYSENTER, STEPPED_OVER
from harness.lockstep.prediction import WHOLE
from harness.lockstep.quirks import (
    BREAKPOINT_AS_SOFTWARE,
    CR4_HIGH_DROPPED,
    CR_READS_AS_CR0,
    EFER_RESERVED_DROPPED,
    EMULATED_BELOW,
    ICEBP_UNDEFINED,
    ILLEGAL_CR4_ENDS,
    INTERCEPT_BEFORE_ILLEGAL,
    INVD_AS_WBINVD,
    INVD_WITHOUT_CPL,
    LMSW_BY_BITS,
    MAPS_TO_THE_BYTE,
    RDTSCP_AS_RDTSC,
    SHADOW_LOST,
    SKINIT_ANY_CPL,
    SKINIT_UNDEFINED,
    STI_ALWAYS_SHADOWS,
    XSETBV_CPL_FIRST,
    XSETBV_INTERCEPT_FIRST,
    XSETBV_NOT_INTERCEPTED,
)
from harness.model import events, intercepts, vmrun
from harness.model.access import ErrorCode
from harness.model.events import Event
from harness.model.illegal import is_illegal
from harness.model.intercepts import FIRST, INTERCEPTS
from harness.model.registers import CR0, CR4, EFER, RFLAGS
from harness.model.vmcb import NP_ENABLE, ExitCode, VIntr
from harness.scenario.ops import ADDRESSED, STEPPED, STRINGS
from harness.wire.layout import STRING_PORT

if TYPE_CHECKING:
    from harness.lockstep.l2 import L2

QUIET: Final = frozenset({"cpuid", "pause", "wbinvd"})
"""Those that go on with no effect that L2 looks at."""

OTHERS: Final = QUIET | {
    "rdtsc", "rdtscp", "clts", "smsw", "lmsw", "in", "out", "inimm", "outimm", "vmmcall", "intn", "breakpoint",
    "overflow", "undefined", "divide", "invd", "xsetbv", "sti", "stiud", "movssud", "rsm", "skinit", "stgi", "clgi",
}
"""Those that this module carries out."""

_STI_BYTES: Final = 1
"""Of STI itself, without the NOP behind it."""

_UMIP: Final = stub.DESCRIPTOR_READS.keys() | {"smsw"}
"""SGDT, SIDT, SLDT, STR and SMSW, which CR4.UMIP keeps for CPL 0 (section 3.1.3)."""

_TAKEN_FOR: Final = {"invd": (INVD_AS_WBINVD, "wbinvd"), "rdtscp": (RDTSCP_AS_RDTSC, "rdtsc")} | {
    f"rdcr{n}": (CR_READS_AS_CR0, "rdcr0") for n in (2, 3, 4, 8)
}
"""Quirks: instructions that another one's intercept is checked for."""

_COUNTERS: Final = frozenset({"rdtsc", "rdtscp"})
_STI: Final = frozenset({"sti", "stiud"})
"""STI, which IOPL lets other CPLs execute."""
_INT_VECTOR: Final = 13
"""Of the INT n of L2's code: one that is an exception's, and that no exception intercept catches."""
_SYSENTER: Final = (0x175, 0x176)
_SHARED_MSRS: Final = (0xC000_0080, 0x277)
_SMSW: Final = 0xFFFF_FFFF
_LMSW: Final = CR0.MP | CR0.EM | CR0.TS
_OF_AN_OVERFLOW: Final = RFLAGS.OF | RFLAGS.SF | RFLAGS.AF | RFLAGS.PF


def do(l2: L2, kind: str, size: int, address: int, value: int) -> int:
    """A probe that is no access to memory: exceptions for what the instruction is, its intercept, and what it does.
    Returns its result."""
    if kind in STEPPED:
        return _stepped(l2, kind, value)
    quirks = l2.state.quirks
    cpl_first = kind == "xsetbv" and l2.regs.cpl and quirks.has(XSETBV_CPL_FIRST)
    asked_first = kind == "xsetbv" and intercepts.asks(l2.state.vmcb, kind) and quirks.has(XSETBV_INTERCEPT_FIRST)
    if _undefined(l2, kind) and not (cpl_first or asked_first):
        l2.exception(Event.exception(events.UD))
    if kind in FIRST and not (kind == "xsetbv" and quirks.has(XSETBV_NOT_INTERCEPTED)):
        _check(l2, kind, size, address, value)
    open_to_all = kind in stub.UNPRIVILEGED or (kind in ("invd", "wbinvd") and quirks.has(INVD_WITHOUT_CPL)) or (
        kind == "skinit" and l2.regs.cpl and quirks.has(SKINIT_ANY_CPL)) or (
        kind == "rdpmc" and l2.regs.cr4 & CR4.PCE) or (
        kind in _STI and l2.regs.cpl <= l2.regs.rflags >> 12 & 3)
    if l2.regs.cpl and (not open_to_all or (kind in _UMIP and l2.regs.cr4 & CR4.UMIP)
                        or (kind in _COUNTERS and l2.regs.cr4 & CR4.TSD)):
        l2.exception(Event.exception(events.GP))
    if kind in ADDRESSED and (value & 0xFFF or value >> l2.state.cpu.maxphyaddr):
        l2.exception(Event.exception(events.GP))  # volume 3, VMRUN and VMLOAD: rAX is no VMCB's address
    name = stub.MSR_FIELDS.get(address, "") if kind == "wrmsr" else kind[2:] if kind.startswith("wr") else ""
    illegal = is_illegal(name, value, l2.regs, l2.state.cpu)
    asks_first = kind == "wrmsr" or (illegal and intercepts.asks(l2.state.vmcb, kind)
                                     and quirks.has(INTERCEPT_BEFORE_ILLEGAL))
    if illegal and not asks_first:  # before the intercept (table 15-7)
        _refuse(l2, name, value)
        return value
    if kind == "skinit" and quirks.has(SKINIT_UNDEFINED):
        l2.exception(Event.exception(events.UD))
    if kind == "invd":  # perhaps taken for WBINVD, which L1 does not intercept
        _step_over(l2, kind, address)
    if kind in _TAKEN_FOR and quirks.has(_TAKEN_FOR[kind][0]):
        _check(l2, _TAKEN_FOR[kind][1], size, address, value, kind)
    elif kind in INTERCEPTS and kind not in FIRST:
        _check(l2, kind, size, address, value)
    if _is_emulated(l2, kind, value) and quirks.has(EMULATED_BELOW):
        end_of_emulation(l2)
    if kind != "invd":
        _step_over(l2, kind, address)
    if illegal:  # of MSRs behind the intercept (15.11)
        _refuse(l2, name, value)
        return value
    if kind in OTHERS:
        return _execute(l2, kind, size, address, value)
    return registers.probe(l2, kind, address, value)


def _stepped(l2: L2, kind: str, value: int) -> int:
    """POPF, and an instruction right behind it: with TF the trap comes behind that one (13.1.4), with the stack pointer
    where POPF left it."""
    if intercepts.asks(l2.state.vmcb, "wrflags") or not l2.intercepted(events.DB):
        raise UsageError(f"{kind}: L1 must intercept #DB, and must not intercept POPF")
    regs, begun = l2.regs, l2.regs.rsp
    registers.pop_flags(l2, value)
    regs.rip = l2.page + l2.state.stub.labels[f"second_{kind}"]
    regs.rsp = l2.step.c + 0x1000 & l2.mask
    result = do(l2, STEPPED[kind], 0, 0, 0)
    if regs.rflags & RFLAGS.TF:
        regs.rax = result
        if kind == "popfcpuid":
            l2.undefined["rax"] = WHOLE
        l2.single_step(f"next_{kind}")
    regs.rsp = begun
    return result


def _refuse(l2: L2, name: str, value: int) -> None:
    """#GP(0) for a write that is illegal. By quirks CR4's ends L2 as a VMRUN that is refused does, or its upper half
    is dropped, and so are EFER's reserved bits: returns then."""
    low = value & 0xFFFF_FFFF
    if name == "cr4" and low != value and not is_illegal(name, low, l2.regs, l2.state.cpu) and (
            l2.state.quirks.has(CR4_HIGH_DROPPED)):
        registers.write(l2, name, low)
        return
    if name == "cr4" and l2.state.quirks.has(ILLEGAL_CR4_ENDS):
        seen = l2.state.seen  # its lower half alone up to 10.0.2
        whole = seen is not None and seen.exitcode == ExitCode.INVALID
        code = ExitCode.INVALID if whole else ExitCode.INVALID & 0xFFFF_FFFF
        raise Leave(code, rule="exit.privileged")
    if name != "efer" or not l2.state.quirks.has(EFER_RESERVED_DROPPED):
        l2.exception(Event.exception(events.GP))


def _step_over(l2: L2, kind: str, address: int) -> None:
    """Note what a hypervisor below L1 steps over in an L2 whose PDPTEs it takes for illegal."""
    own = kind.endswith("msr") and address not in _SHARED_MSRS
    if kind in STEPPED_OVER and _in_pae(l2) and l2.state.vmcb["np_control"] & NP_ENABLE:
        if not own:
            l2.out.perils.add(PAE_STEPPED_OVER)
        elif address in _SYSENTER:
            l2.out.perils.add(PAE_SYSENTER)


def write_is_emulated(l2: L2, index: int) -> None:
    """By a quirk: a hypervisor below L1 emulates L2's write to a page of which it keeps a shadow, perhaps since one of
    an earlier program; which it does cannot be known, only seen."""
    seen = l2.state.seen
    if (seen is not None and seen.next_probe == index and seen.exitcode == ExitCode.EXCEPTION + events.PF
            and cannot_be_emulated(l2)):
        end_of_emulation(l2)


def _is_emulated(l2: L2, kind: str, value: int) -> bool:
    """Whether a hypervisor below L1 has to emulate this instruction of an L2 in PAE mode, though L1 does not intercept
    it, and finds PDPTEs with reserved bits on the way: of CR0 only writes that change more than TS and MP; without
    nested paging, where it has PDPTEs from VMRUN on, only what makes it load them again."""
    regs = l2.regs
    if not _in_pae(l2):
        return False
    if not l2.state.vmcb["np_control"] & NP_ENABLE:
        return kind == "wrcr4" and bool((regs.cr4 ^ value) & (CR4.PGE | CR4.PSE | CR4.PAE | CR4.SMEP))
    if kind == "lmsw":
        return bool((regs.cr0 ^ value) & CR0.EM)
    return kind in ("rdcr4", "wrcr4") or (kind == "wrcr0" and bool((regs.cr0 ^ value) & ~(CR0.TS | CR0.MP)))


def _in_pae(l2: L2) -> bool:
    regs = l2.regs
    return bool(regs.cr0 & CR0.PG and regs.cr4 & CR4.PAE and not regs.efer & EFER.LMA)


def end_of_emulation(l2: L2) -> None:
    """What L2 sees of it: its own code cannot be fetched. Raises Leave."""
    regs, seen = l2.regs, l2.state.seen
    nested_table = ErrorCode.GUEST_TABLE | ErrorCode.U | ErrorCode.W
    if (seen is not None and seen.next_probe == l2.out.next_probe and seen.exitcode == ExitCode.NPF
            and seen.fault_code == nested_table and l2.state.vmcb["np_control"] & NP_ENABLE):
        # PDPTEs of an earlier program, which it has kept since those of now are refused
        raise Leave(ExitCode.NPF, nested_table, seen.fault_address, rule="nested.present")
    if not l2.state.vmcb["np_control"] & NP_ENABLE:
        l2.exception(Event.exception(events.GP))
    code = ErrorCode.ID if regs.efer & EFER.NXE or regs.cr4 & CR4.SMEP else 0
    l2.exception(Event.exception(events.PF, code | (ErrorCode.U if regs.cpl == 3 else 0)),
                 regs.rip + l2.base & l2.mask)


def string_port(l2: L2, kind: str, size: int, count: int) -> None:
    """INS or OUTS up to its access of memory: its intercept, and a hypervisor below that has to emulate it. Raises
    Leave if it is intercepted, UsageError for what is not modelled."""
    if l2.regs.cpl > l2.regs.rflags >> 12 & 3:
        raise UsageError("ports at a CPL above IOPL are not modelled")
    if not count:  # neither volume 2 nor 3 says whether one that does nothing asks for its port
        if intercepts.asks(l2.state.vmcb, kind):
            raise UsageError("a string instruction that L1 may intercept, with rCX = 0, is not modelled")
        return
    _check(l2, kind, size, STRING_PORT, 0)
    if cannot_be_emulated(l2):
        end_of_emulation(l2)


def cannot_be_emulated(l2: L2) -> bool:
    """By a quirk: whether a hypervisor below L1 fails with what it has to emulate of L2 in any case, string I/O or an
    access of a device."""
    return bool(_in_pae(l2) and l2.state.vmcb["np_control"] & NP_ENABLE and l2.state.quirks.has(EMULATED_BELOW))


def _undefined(l2: L2, kind: str) -> bool:
    """Whether the instruction is none of this processor's as L2 has set it up."""
    if kind == "icebp":
        return l2.state.quirks.has(ICEBP_UNDEFINED)
    if kind in ("monitor", "mwait"):  # volume 3: at other CPLs only with MonMwaitUserEn, which L1 leaves clear
        return l2.regs.cpl > 0
    if kind[2:] in ("dr4", "dr5"):  # 13.1.1: other names of DR6 and DR7 while DE is 0
        if l2.regs.cpl and l2.regs.cr4 & CR4.DE:
            raise UsageError("whether DR4 and DR5 raise #UD or #GP at a CPL above 0 is not said")
        return bool(l2.regs.cr4 & CR4.DE)
    return kind == "xsetbv" and not l2.regs.cr4 & CR4.OSXSAVE


def length(l2: L2, kind: str, size: int = 0) -> int:
    """Bytes of a probe's instruction."""
    name = stub.label(kind, size)
    return l2.state.stub.labels[f"next_{name}"] - l2.state.stub.labels[name]


def _next_rip(l2: L2, kind: str, size: int = 0) -> int:
    return l2.regs.rip + length(l2, kind, size)


def _check(l2: L2, kind: str, size: int, address: int, value: int, probe: str = "") -> None:
    """Leave, if L1 intercepts this instruction; `probe` is the one that it is in truth."""
    vmcb, regs, ram = l2.state.vmcb, l2.regs, l2.state.memory.words
    begun = regs.rsp
    if kind in ("rdflags", "wrflags"):
        regs.rsp = l2.step.c + 0x1000 - (l2.state.mode.native if kind == "wrflags" else 0) & l2.mask
    info1 = info2 = 0
    try:
        if kind in ("rdmsr", "wrmsr"):
            asked = intercepts.msr(vmcb, ram, address, kind == "wrmsr", l2.state.quirks.has(MAPS_TO_THE_BYTE))
            info1 = int(kind == "wrmsr")
        elif kind in ("in", "out", "inimm", "outimm"):
            asked = intercepts.port(vmcb, ram, address, size, l2.state.quirks.has(MAPS_TO_THE_BYTE))
            info1 = intercepts.ioio_info(address, size, kind.startswith("in"), 64 if l2.state.mode.long else 32)
            info2 = _next_rip(l2, kind, size)
        elif kind in STRINGS:
            asked = intercepts.port(vmcb, ram, address, size, l2.state.quirks.has(MAPS_TO_THE_BYTE))
            info1 = intercepts.string_info(address, size, kind, 64 if l2.state.mode.long else 32)
            info2 = _next_rip(l2, kind, size)
        else:
            asked = intercepts.asks(vmcb, kind)
    except IndexError:
        raise UsageError(f"a permission map at {vmcb['msrpm_base']:#x} or {vmcb['iopm_base']:#x} is not in "
                         "L1's memory") from None
    code = INTERCEPTS[kind].exitcode
    if not asked and kind in ("wrcr0", "lmsw"):
        new = regs.cr0 & ~_LMSW | value & (_LMSW | CR0.PE) if kind == "lmsw" else value
        always = kind == "lmsw" and not l2.state.quirks.has(LMSW_BY_BITS)
        asked = intercepts.cr0_selective(vmcb, regs.cr0, new, always)
        code = INTERCEPTS["cr0-selective"].exitcode
    if asked:
        raise Leave(code, info1, info2, rule="exit.intercept", length=length(l2, probe or kind, size))
    regs.rsp = begun


def _execute(l2: L2, kind: str, size: int, address: int, value: int) -> int:
    """What an instruction of OTHERS does that is not intercepted; returns the probe's result."""
    regs, vmcb = l2.regs, l2.state.vmcb
    match kind:
        case "rdtsc" | "rdtscp":
            return vmcb["tsc_offset"]  # what is added to L1's counter: see compare.check_counter
        case "clts":
            registers.write(l2, "cr0", regs.cr0 & ~CR0.TS)
        case "smsw":
            return regs.cr0 & _SMSW
        case "lmsw":
            registers.write(l2, "cr0", regs.cr0 & ~_LMSW | value & (_LMSW | CR0.PE))
        case "in" | "out" | "inimm" | "outimm":
            if kind == "out" and (address, size) == (STRING_PORT, 4):
                l2.state.outside["cf8"] = value & 0xFFFF_FFFF
            if regs.cpl > regs.rflags >> 12 & 3:
                raise UsageError("ports at a CPL above IOPL are not modelled")
            return 0
        case "invd" if not l2.state.quirks.has(INVD_AS_WBINVD):
            raise UsageError("L1 must intercept INVD: what is in the caches is lost by it")
        case "xsetbv":
            l2.exception(Event.exception(events.GP))  # ECX is none of an extended control register
        case "skinit" if not regs.cpl:
            raise UsageError("L1 must intercept SKINIT: what it does inside of L2 is not modelled")
        case "vmmcall" | "undefined" | "rsm" | "skinit":  # RSM outside of SMM; SKINIT only by SKINIT_ANY_CPL
            l2.exception(Event.exception(events.UD))
        case "divide":
            l2.exception(Event.exception(events.DE))
        case "intn":
            l2.deliver(Event(_INT_VECTOR, events.SOFTWARE), next_rip=_next_rip(l2, kind))
        case "breakpoint" | "overflow":
            _trap(l2, kind)
        case "sti" | "stiud":
            _sti(l2, kind)
        case "movssud":
            _mov_ss(l2)
        case "stgi" | "clgi":
            _virtual_gif(l2, kind)
    return 0 if kind in QUIET else value


def _sti(l2: L2, kind: str) -> None:
    """STI, and NOP or UD2 behind it: the instruction that follows an STI that sets IF is in its shadow (15.21.5;
    volume 3, STI), and so is the state that is saved if that one ends L2. By a quirk the shadow is gone before."""
    regs = l2.regs
    shadow = not regs.rflags & RFLAGS.IF
    regs.rflags |= RFLAGS.IF
    pending = "interrupt" in l2.state.outside or vmrun.virtual_interrupt(l2.state.vmcb, regs.rflags) is not None
    lost = kind == "sti" and shadow and pending and l2.state.quirks.has(SHADOW_LOST)
    regs.rip += _STI_BYTES if lost else length(l2, kind)
    if kind == "stiud":
        if not l2.intercepted(events.UD):
            raise UsageError("an exception in an interrupt shadow that L1 does not intercept is not modelled")
        l2.in_shadow = (shadow or l2.state.quirks.has(STI_ALWAYS_SHADOWS)) and not l2.state.quirks.has(SHADOW_LOST)
        l2.exception(Event.exception(events.UD))
    physical(l2)
    l2.interrupt()


def _mov_ss(l2: L2) -> None:
    """MOV to SS of a null selector, and UD2: the instruction behind it is in its shadow (15.21.5); but see _sti()."""
    if l2.regs.cpl or not l2.intercepted(events.UD):
        raise UsageError("MOV to SS is modelled at CPL 0, and behind it a #UD that L1 intercepts")
    registers.load_null(l2, "ss", 0)
    l2.regs.rip += length(l2, "movssud")
    l2.in_shadow = not l2.state.quirks.has(SHADOW_LOST)
    l2.exception(Event.exception(events.UD))


def _virtual_gif(l2: L2, kind: str) -> None:
    """STGI and CLGI of an L2 whose GIF is virtual (section 15.33.1): with it set, the virtual interrupt that is pending
    is taken."""
    vmcb = l2.state.vmcb
    if not vmcb["v_intr"] & VIntr.GIF_ENABLE:
        raise UsageError("L1 must intercept STGI and CLGI where L2's GIF is its own")
    vmcb["v_intr"] = vmcb["v_intr"] & ~VIntr.GIF | (VIntr.GIF if kind == "stgi" else 0)
    if kind == "stgi":
        l2.regs.rip += length(l2, kind)
        physical(l2)
        l2.interrupt()


def _trap(l2: L2, kind: str) -> None:
    """INT3 and INTO: exceptions whose saved RIP, where they are intercepted, is their own (section 15.12)."""
    vector = events.BP if kind == "breakpoint" else events.OF
    if kind == "overflow":
        l2.regs.rflags = l2.regs.rflags & ~RFLAGS.STATUS | _OF_AN_OVERFLOW
    if l2.state.quirks.has(BREAKPOINT_AS_SOFTWARE):
        if intercepts.asks(l2.state.vmcb, "intn"):
            raise Leave(INTERCEPTS["intn"].exitcode, rule="exit.intercept")
        l2.deliver(Event(vector, events.SOFTWARE), next_rip=_next_rip(l2, kind))
    if l2.intercepted(vector):
        raise Leave(ExitCode.EXCEPTION + vector, rule="exit.exception", length=length(l2, kind))
    l2.deliver(Event(vector), next_rip=_next_rip(l2, kind))
