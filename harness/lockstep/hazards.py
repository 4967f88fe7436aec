"""What a machine does not survive: scenarios that would lose it, for errata to name.

A machine that is lost costs a boot, and what it was lost in is no verdict; one that is left in a state of which nothing
can be said makes verdicts of what follows worthless. Where that is known, the scenario is not run, and the reason told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from harness.errors import UsageError
from harness.lockstep.active import Active
from harness.lockstep.prediction import Prediction
from harness.lockstep.quirks import NESTED_PDPTE_UNCHECKED, below
from harness.lockstep.state import State
from harness.model.access import NestedPageFault, Reached
from harness.model.entries import FRAME, NX, P
from harness.model.events import EVENT_VALID
from harness.model.registers import CR4, EFER, RFLAGS
from harness.model.vmcb import MISC1_INTR, MISC1_NMI, NP_ENABLE, VIntr
from harness.model.walk import FINAL, Paging, Walk
from harness.scenario.ops import EntryOp, HostOp, RunOp, Scenario, VmcbOp

_HIGH: Final = 0xFFF << 52


def _nested_pdpte_high_bits(paging: Paging, walk: Walk) -> bool:
    """A walk that comes by a PDPTE of a nested PAE table with one of bits 63:52 set."""
    return paging.nested is not None and paging.nested.name == "PAE" and any(
        dimension == "nested" and name == "pdpte" and entry & P and entry & _HIGH
        for dimension, name, _, _, entry in walk.trail)


def _beyond_nested_pae(paging: Paging, walk: Walk) -> bool:
    """A walk to or by a gPA of 4 GiB or more, of which a nested PAE table translates the low 32 bits."""
    if paging.nested is None or paging.nested.name != "PAE":
        return False
    match walk.outcome:
        case Reached(_, gpa) | NestedPageFault(_, gpa) if gpa >> 32:
            return True
    tables = [entry & FRAME for dimension, _, _, _, entry in walk.trail if dimension == "guest"]
    return any(table >> 32 for table in tables[:-1])


def _lma_without_pae(state: State) -> bool:
    """A VMRUN with EFER.LMA=1, LME=0 and CR4.PAE=0."""
    vmcb = state.vmcb
    return bool(vmcb["efer"] & EFER.LMA and not vmcb["efer"] & EFER.LME and not vmcb["cr4"] & CR4.PAE)


def _changes(field: str) -> Callable[[Scenario], bool]:
    """Whether a scenario writes that field of a VMCB."""
    return lambda scenario: any(isinstance(op, VmcbOp) and op.field == field for op in scenario.ops)


def _writes_cr8(scenario: Scenario) -> bool:
    return _changes("v_intr")(scenario) and any(
        probe.kind == "wrcr8" for op in scenario.ops if isinstance(op, RunOp) for probe in op.probes)


def _shares_nested_tables(scenario: Scenario) -> bool:
    return any(isinstance(op, EntryOp) and (op.frame or "").startswith("nested") for op in scenario.ops)


def _steps_in_pae(scenario: Scenario) -> bool:
    return scenario.guest == "PAE" and any(
        probe.kind in STEPPED_OVER for op in scenario.ops if isinstance(op, RunOp) for probe in op.probes)


def _flushes_a_page(scenario: Scenario) -> bool:
    return any(probe.kind == "invlpg" for op in scenario.ops if isinstance(op, RunOp) for probe in op.probes)


def _pending(what: str) -> Callable[[Scenario], bool]:
    """Whether L1 sends itself that in a scenario."""
    return lambda scenario: any(isinstance(op, HostOp) and op.register == what for op in scenario.ops)


def _any(scenario: Scenario) -> bool:
    return True


def _interrupt_held_back(state: State) -> bool:
    """A VMRUN with an interrupt pending for L1, which L1 intercepts, and which L1's IF, or without V_INTR_MASKING L2's,
    holds back."""
    vmcb = state.vmcb
    flags = state.host.rflags if vmcb["v_intr"] & VIntr.MASKING else vmcb["rflags"]
    return bool("interrupt" in state.outside and vmcb["intercept_misc1"] & MISC1_INTR and not flags & RFLAGS.IF)


def _nmi_with_event(state: State) -> bool:
    """A VMRUN with an NMI pending for L1, which L2 is to take, or with an interrupt too, or an event to inject."""
    vmcb = state.vmcb
    takes = not vmcb["intercept_misc1"] & MISC1_NMI
    return bool("nmi" in state.outside and (takes or "interrupt" in state.outside or vmcb["eventinj"] & EVENT_VALID))


def _nested_root_outside(state: State) -> bool:
    """A VMRUN with a nested table outside of L1's memory, or one of PAE of which a PDPTE leads there."""
    vmcb = state.vmcb
    outside = vmcb["ncr3"] & ~0xFFF >= state.image.ram_end
    return bool(vmcb["np_control"] & NP_ENABLE and outside) or state.leads_outside()


def _nested_nx_at_table(paging: Paging, walk: Walk) -> bool:
    """A nested walk for one of L2's tables that comes to a page by an entry with NX set."""
    faulted = isinstance(walk.outcome, NestedPageFault)
    last = walk.trail[-1][2] if faulted and walk.trail else ""
    return any(dimension == "nested" and purpose not in (FINAL, last) and entry & NX
               for dimension, _, purpose, _, entry in walk.trail)


class Hazard(NamedTuple):
    """What loses a machine: a VMRUN in such a state, a walk under such a paging, a VMRUN that must be `refused`, or one
    of `Prediction.perils`. `suspects` are the scenarios that may come to it: only those are rehearsed for it; also with
    `quirks`, by which the same machine gets further than it should."""

    suspects: Callable[[Scenario], bool]
    vmrun: Callable[[State], bool] = lambda state: False
    walk: Callable[[Paging, Walk], bool] = lambda paging, walk: False
    peril: str = ""
    refused: bool = False
    quirks: tuple[str, ...] = ()


CR8_WITH_V_IRQ: Final = "cr8-with-v-irq"
"""L2 writes CR8 while a virtual interrupt is pending whose priority is not below V_TPR then."""
PAE_STEPPED_OVER: Final = "pae-stepped-over"
"""L2, in PAE paging under a nested table, executes what a hypervisor below L1 carries out without a walk of its own,
and then has to fetch, to step over it."""
PAE_SYSENTER: Final = "pae-sysenter"
"""The same, of SYSENTER_ESP and SYSENTER_EIP, which newer hypervisors leave to L2."""
STEPPED_OVER: Final = frozenset({"cpuid", "invd", "wbinvd", "rdmsr", "wrmsr"})
"""Such instructions; of MSRs those that are not L2's own to use, EFER and PAT."""

DELIVERY_IN_SHADOW: Final = "delivery-in-shadow"
"""An event that is no interrupt is delivered, by a table of L2's in a page that is also one of L1's nested tables."""
OTHER_PAGING: Final = "other-paging"
"""L2 leaves with paging off, and its CR4 is of another kind of paging than L1's."""
LEGACY_INVLPG: Final = "legacy-invlpg"
"""L2, in legacy paging under an L1 in long mode, executes INVLPG itself."""
BUSY_TSS: Final = "busy-tss"
"""An event goes from CPL 3 to a handler in legacy mode, and TR has a TSS that is busy."""

HAZARDS: Final = {
    "nested-pdpte-high-bits": Hazard(lambda scenario: scenario.nested == "PAE", walk=_nested_pdpte_high_bits,
                                     quirks=(NESTED_PDPTE_UNCHECKED, below("pae-pdpte"))),
    "beyond-nested-pae": Hazard(lambda scenario: scenario.nested == "PAE", walk=_beyond_nested_pae),
    "nested-root-outside": Hazard(
        lambda scenario: scenario.nested == "PAE" or _changes("ncr3")(scenario), vmrun=_nested_root_outside),
    "lma-without-pae": Hazard(_changes("efer"), vmrun=_lma_without_pae),
    "interrupt-held-back": Hazard(_pending("interrupt"), vmrun=_interrupt_held_back),
    "nmi-with-event": Hazard(_pending("nmi"), vmrun=_nmi_with_event),
    "nested-nx-at-table": Hazard(_any, walk=_nested_nx_at_table),
    "vmrun-unchecked": Hazard(_any, refused=True),
    DELIVERY_IN_SHADOW: Hazard(_shares_nested_tables, peril=DELIVERY_IN_SHADOW),
    OTHER_PAGING: Hazard(_any, peril=OTHER_PAGING),
    LEGACY_INVLPG: Hazard(_flushes_a_page, peril=LEGACY_INVLPG),
    BUSY_TSS: Hazard(_changes("tr.attrib"), peril=BUSY_TSS),
    CR8_WITH_V_IRQ: Hazard(_writes_cr8, peril=CR8_WITH_V_IRQ),
    PAE_STEPPED_OVER: Hazard(_steps_in_pae, peril=PAE_STEPPED_OVER),
    PAE_SYSENTER: Hazard(_steps_in_pae, peril=PAE_SYSENTER),
}


class Peril(UsageError):
    """The machine would be lost."""


class Hazards:
    """Those of a machine; each with the id of the erratum that names it."""

    def __init__(self, named: Iterable[tuple[str, str]]) -> None:
        self._known = [(HAZARDS[hazard], name) for hazard, name in named]
        further = {quirk for hazard, _ in self._known for quirk in hazard.quirks}
        self.courses: tuple[Active, ...] = (Active(), Active(sorted(further))) if further else (Active(),)
        """The quirks with which to rehearse a suspect, one after the other: none first."""

    def __bool__(self) -> bool:
        return bool(self._known)

    def suspect(self, scenario: Scenario) -> bool:
        """Whether the machine may be lost by it."""
        return any(hazard.suspects(scenario) for hazard, _ in self._known)

    def enter(self, state: State) -> None:
        """Raises Peril if the machine would be lost by VMRUN in that state."""
        for hazard, name in self._known:
            if hazard.vmrun(state):
                raise Peril(f"the machine would be lost: see erratum {name}")

    def see(self, prediction: Prediction) -> None:
        """Raises Peril if the machine would be lost by what is predicted."""
        for hazard, name in self._known:
            walks = ((paging, walk) for paging, _, walk in prediction.accesses)
            refused = hazard.refused and prediction.refused
            if refused or hazard.peril in prediction.perils or any(hazard.walk(*one) for one in walks):
                raise Peril(f"the machine would be lost: see erratum {name}")
