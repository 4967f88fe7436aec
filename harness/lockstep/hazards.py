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

_HIGH: Final = 0xFFF << 52


def _nested_pdpte_high_bits(paging: Paging, walk: Walk) -> bool:
    """A walk that comes by a PDPTE of a nested PAE table with one of bits 63:52 set."""
    return paging.nested is not None and paging.nested.name == "PAE" and any(
        dimension == "nested" and name == "pdpte" and entry & P and entry & _HIGH
        for dimension, name, _, _, entry in walk.trail)


def _lma_without_pae(vmcb: Vmcb) -> bool:
    """A VMRUN with EFER.LMA=1, LME=0 and CR4.PAE=0."""
    return bool(vmcb["efer"] & EFER.LMA and not vmcb["efer"] & EFER.LME and not vmcb["cr4"] & CR4.PAE)


class Hazard(NamedTuple):
    """What loses a machine: a VMRUN with such a VMCB, or a walk under such a paging."""

    vmrun: Callable[[Vmcb], bool] = lambda vmcb: False
    walk: Callable[[Paging, Walk], bool] = lambda paging, walk: False


HAZARDS: Final = {
    "nested-pdpte-high-bits": Hazard(walk=_nested_pdpte_high_bits),
    "lma-without-pae": Hazard(vmrun=_lma_without_pae),
}


class Hazards:
    """Those of a machine; each with the id of the erratum that names it."""

    def __init__(self, named: Iterable[tuple[str, str]]) -> None:
        self._known = [(HAZARDS[hazard], name) for hazard, name in named]

    def __bool__(self) -> bool:
        return bool(self._known)

    def enter(self, vmcb: Vmcb) -> None:
        """Raises UsageError if the machine would be lost by VMRUN of `vmcb`."""
        for hazard, name in self._known:
            if hazard.vmrun(vmcb):
                raise UsageError(f"the machine would be lost: see erratum {name}")

    def see(self, prediction: Prediction) -> None:
        """Raises UsageError if the machine would be lost by what is predicted."""
        for hazard, name in self._known:
            if any(hazard.walk(paging, walk) for paging, _, walk in prediction.accesses):
                raise UsageError(f"the machine would be lost: see erratum {name}")
