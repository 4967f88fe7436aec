"""What a machine does not survive: scenarios that would lose it, for errata to name.

A machine that is lost costs a boot, and what it was lost in is no verdict. Where it is known that it would be, the
scenario is not run, and the reason told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from harness.errors import UsageError
from harness.lockstep.prediction import Prediction
from harness.model.entries import P
from harness.model.registers import CR4, EFER
from harness.model.vmcb import Vmcb
from harness.model.walk import Paging, Walk
from harness.scenario.ops import RunOp, Scenario, VmcbOp

_HIGH: Final = 0xFFF << 52


def _nested_pdpte_high_bits(paging: Paging, walk: Walk) -> bool:
    """A walk that comes by a PDPTE of a nested PAE table with one of bits 63:52 set."""
    return paging.nested is not None and paging.nested.name == "PAE" and any(
        dimension == "nested" and name == "pdpte" and entry & P and entry & _HIGH
        for dimension, name, _, _, entry in walk.trail)


def _lma_without_pae(vmcb: Vmcb) -> bool:
    """A VMRUN with EFER.LMA=1, LME=0 and CR4.PAE=0."""
    return bool(vmcb["efer"] & EFER.LMA and not vmcb["efer"] & EFER.LME and not vmcb["cr4"] & CR4.PAE)


def _changes(field: str) -> Callable[[Scenario], bool]:
    """Whether a scenario writes that field of a VMCB."""
    return lambda scenario: any(isinstance(op, VmcbOp) and op.field == field for op in scenario.ops)


def _writes_cr8(scenario: Scenario) -> bool:
    return _changes("v_intr")(scenario) and any(
        probe.kind == "wrcr8" for op in scenario.ops if isinstance(op, RunOp) for probe in op.probes)


class Hazard(NamedTuple):
    """What loses a machine: a VMRUN with such a VMCB, a walk under such a paging, or one of `Prediction.perils`.
    `suspects` are the scenarios that may come to it: only those are rehearsed for it."""

    suspects: Callable[[Scenario], bool]
    vmrun: Callable[[Vmcb], bool] = lambda vmcb: False
    walk: Callable[[Paging, Walk], bool] = lambda paging, walk: False
    peril: str = ""


CR8_WITH_V_IRQ: Final = "cr8-with-v-irq"
"""L2 writes CR8 while a virtual interrupt is pending whose priority is not below V_TPR then."""

HAZARDS: Final = {
    "nested-pdpte-high-bits": Hazard(lambda scenario: scenario.nested == "PAE", walk=_nested_pdpte_high_bits),
    "lma-without-pae": Hazard(_changes("efer"), vmrun=_lma_without_pae),
    CR8_WITH_V_IRQ: Hazard(_writes_cr8, peril=CR8_WITH_V_IRQ),
}


class Peril(UsageError):
    """The machine would be lost."""


class Hazards:
    """Those of a machine; each with the id of the erratum that names it."""

    def __init__(self, named: Iterable[tuple[str, str]]) -> None:
        self._known = [(HAZARDS[hazard], name) for hazard, name in named]

    def __bool__(self) -> bool:
        return bool(self._known)

    def suspect(self, scenario: Scenario) -> bool:
        """Whether the machine may be lost by it."""
        return any(hazard.suspects(scenario) for hazard, _ in self._known)

    def enter(self, vmcb: Vmcb) -> None:
        """Raises Peril if the machine would be lost by VMRUN of `vmcb`."""
        for hazard, name in self._known:
            if hazard.vmrun(vmcb):
                raise Peril(f"the machine would be lost: see erratum {name}")

    def see(self, prediction: Prediction) -> None:
        """Raises Peril if the machine would be lost by what is predicted."""
        for hazard, name in self._known:
            walks = ((paging, walk) for paging, _, walk in prediction.accesses)
            if hazard.peril in prediction.perils or any(hazard.walk(*one) for one in walks):
                raise Peril(f"the machine would be lost: see erratum {name}")
