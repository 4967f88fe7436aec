"""Known ways in which a machine's walk differs from the manual's, as other table formats.

The model never has them. When a prediction fails on a machine whose errata name quirks, the VMRUN is
predicted once more with them: only if everything then agrees are the divergences that erratum's.
They are reported all the same; what is gained is that the run can go on from what the machine did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from harness.model.entries import A, Format, G, Level
from harness.model.walk import Paging


def _levels(fmt: Format | None, change: Callable[[Format, Level], Level]) -> Format | None:
    if fmt is None:
        return None
    return fmt._replace(levels=tuple(change(fmt, level) for level in fmt.levels))


def _both(change: Callable[[Format, Level], Level]) -> Callable[[Paging], Paging]:
    def apply(paging: Paging) -> Paging:
        return paging._replace(guest=_levels(paging.guest, change), nested=_levels(paging.nested, change))

    return apply


def _pml4e_bit_8(fmt: Format, level: Level) -> Level:
    """Bit 8 of a PML4E (and PML5E) is not reserved."""
    if level.name not in ("pml4e", "pml5e"):
        return level
    return level._replace(reserved_table=level.reserved_table & ~G)


def _pae_pdpte(fmt: Format, level: Level) -> Level:
    """A PDPTE of PAE mode is taken for a long-mode one: bits 8:5 and 2:1 not reserved, bit 5 set as A."""
    if fmt.name != "PAE" or level.name != "pdpte":
        return level
    return level._replace(reserved_table=level.reserved_table & ~0x1E6, accessed=A)


def _no_legacy_nested(paging: Paging) -> Paging:
    """Nested tables in the format of 32-bit paging are not walked: a gPA is taken for the sPA."""
    if paging.nested is None or paging.nested.name != "32-bit":
        return paging
    return paging._replace(nested=None)


QUIRKS: Final[dict[str, Callable[[Paging], Paging]]] = {
    "pml4e-bit-8": _both(_pml4e_bit_8),
    "pae-pdpte": _both(_pae_pdpte),
    "no-legacy-nested": _no_legacy_nested,
}


def with_quirks(paging: Paging, names: Iterable[str]) -> Paging:
    """`paging` as a machine with these quirks walks it."""
    for name in names:
        paging = QUIRKS[name](paging)
    return paging
