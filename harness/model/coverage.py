"""What a run has put to the test: the cells that a walk reaches.

A cell is a rule as it decided one kind of case: in which dimension, at which level, in which pair of
modes, with which outcome. `harness.model.universe` says which cells there are; this module says which of
them a walk belongs to, from its entries and its outcome alone, so that the walk itself pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from harness.model.access import Access, GeneralProtection, NestedPageFault, PageFault, Reached, StackFault
from harness.model.entries import FRAME, KEY_SHIFT, NX, PS, RW, US, D, Format, G, Level, P
from harness.model.registers import PKRU_AD, PKRU_WD
from harness.model.walk import FINAL, GUEST, Paging, Walk

BOTH: Final = "both"
NESTED_PAGE: Final = "nested page"
NESTED_TABLE: Final = "nested table"
"""Dimensions of a cell, beside `guest`: the nested walk of the page itself, and that of a guest table."""

NONE: Final = "none"
OFF: Final = "off"
"""In a pair of modes: without nested paging, and with L2's paging off."""

_SIZES: Final = {21: "2M", 22: "4M", 30: "1G"}
_RIGHTS: Final = {"user": US, "write": RW, "execute": NX}
"""Rules that look at one right over all levels of a dimension, and its bit."""

_VECTORS: Final[dict[type, str]] = {
    PageFault: "#PF", NestedPageFault: "#NPF", GeneralProtection: "#GP", StackFault: "#SS",
}

_RESERVED: Final = ((NX, "NX"), (0x7FF << 52, "bits 62:52"), (G, "G"), (PS, "PS"))


class Cell(NamedTuple):
    """One thing to test. `level` is the deciding entry's name, with the size of the page it maps if that is a
    large one (`pde 2M`); `mode` is the table formats of L2 and L1 (`4-level/PAE`)."""

    rule: str
    dimension: str
    level: str
    mode: str
    outcome: str


def mode_of(paging: Paging) -> str:
    """The pair of modes of a translation: L2's, and that of L1's nested tables."""
    return f"{paging.guest.name if paging.guest else OFF}/{paging.nested.name if paging.nested else NONE}"


def cells_of(paging: Paging, access: Access, walk: Walk) -> Iterator[Cell]:
    """The cells that a walk reaches: one for the rule that decided it, one for each rule whose subject it met and
    that let it pass, and those of its accessed and dirty bits."""
    mode = mode_of(paging)
    dimensions = _dimensions(paging, walk)
    if access.shadow_stack:
        yield from _shadow_stack(paging, access, walk, dimensions, mode)
        return
    if isinstance(walk.outcome, Reached):
        leaves = "/".join(steps[-1].level for _, _, steps in dimensions)
        yield Cell("reached", BOTH, leaves, mode, _who(access))
        if access.write:
            yield Cell("write", "", "", mode, "written")
        for dimension, name, steps in dimensions:
            yield from _passed(paging, access, dimension, name, steps, mode)
    elif not dimensions:
        yield Cell(walk.rule, GUEST, "", mode, f"{_vector(walk)} {_who(access)}")
    else:
        yield from _denied(paging, access, walk, *dimensions[-1], mode)
    yield from _updated(paging, access, walk, mode)


class _Seen(NamedTuple):
    """An entry as a cell has it: `level` is its name there, `entry` as read, `table` its level of the format."""

    level: str
    entry: int
    table: Level


_Dimension = tuple[str, str, list[_Seen]]
"""Its name in a cell, that of its rules, and the entries read in it."""


def _seen(fmt: Format, steps: list[tuple[str, str, str, int, int]]) -> list[_Seen]:
    return [
        _Seen(level_name(level, entry), entry, level)
        for level, (_, _, _, _, entry) in zip(fmt.levels, steps, strict=False)
    ]


def level_name(level: Level, entry: int) -> str:
    """How cells call a present entry of that level."""
    large = entry & P and level.shift in _SIZES and entry & level.leaf
    return f"{level.name} {_SIZES[level.shift]}" if large else level.name


def _dimensions(paging: Paging, walk: Walk) -> list[_Dimension]:
    """The guest's entries and those of the last nested walk, in the order of their being decided over."""
    out: list[_Dimension] = []
    trail = walk.trail
    if not trail:
        return out
    if paging.guest is not None and (steps := [step for step in trail if step[0] == GUEST]):
        out.append((GUEST, GUEST, _seen(paging.guest, steps)))
    dimension, _, purpose, _, _ = trail[-1]
    if paging.nested is not None and dimension != GUEST:
        start = len(trail)
        while start and trail[start - 1][0] == dimension and trail[start - 1][2] == purpose:
            start -= 1
        name = NESTED_PAGE if purpose == FINAL else NESTED_TABLE
        out.append((name, dimension, _seen(paging.nested, trail[start:])))
    return out


def _denied(
    paging: Paging, access: Access, walk: Walk, dimension: str, name: str, steps: list[_Seen], mode: str
) -> Iterator[Cell]:
    """The cell of the rule that ended a walk; none where more than one entry broke it, which tests neither."""
    last = steps[-1]
    rule = walk.rule.removeprefix(f"{name}.")
    outcome = _vector(walk) if dimension == NESTED_TABLE else f"{_vector(walk)} {_who(access, dimension)}"
    if rule == "reserved":
        reasons = reserved(last.table, last.entry)
        if len(reasons) == 1:
            yield Cell(walk.rule, dimension, last.level, mode, f"{_vector(walk)} {reasons.pop()}")
        return
    if rule == "smap" and access.implicit:
        outcome = f"{_vector(walk)} implicit"
    elif rule == "key":
        outcome += ", AD" if _of_key(paging, last) & PKRU_AD else ", WD"
    if rule in _RIGHTS:
        lacking = _lacking(steps, _RIGHTS[rule])
        if len(lacking) == 1:
            yield Cell(walk.rule, dimension, lacking[0].level, mode, outcome)
        return
    yield Cell(walk.rule, dimension, last.level, mode, outcome)


def _passed(
    paging: Paging, access: Access, dimension: str, name: str, steps: list[_Seen], mode: str
) -> Iterator[Cell]:
    """A right is missing at one level, and the access was permitted all the same."""
    for rule, right in _RIGHTS.items():
        lacking = _lacking(steps, right)
        if len(lacking) == 1:
            why = "other access"
            if rule == "write" and access.write:
                why = "CR0.WP=0"
            elif rule == "user":
                why = "supervisor"
                if dimension != GUEST:
                    rule, why = "gmet", "U/S=0"
            yield Cell(f"{name}.{rule}", dimension, lacking[0].level, mode, f"permitted, {why}")
    if dimension == GUEST:
        user_page, level = not _lacking(steps, US), steps[-1].level
        if paging.smap and not access.user and not access.fetch and user_page:
            yield Cell("guest.smap", dimension, level, mode, "permitted, AC=1")
        if paging.pkru and (denied := _of_key(paging, steps[-1])):
            why = "fetch" if access.fetch else "read" if not access.write else "CR0.WP=0"
            if user_page:
                yield Cell("guest.key", dimension, level, mode, f"permitted, {why}")
            elif denied & PKRU_AD:
                yield Cell("guest.key", dimension, level, mode, "permitted, supervisor page")


def _of_key(paging: Paging, leaf: _Seen) -> int:
    """AD and WD of the key of a guest's leaf."""
    return paging.pkru >> 2 * (leaf.entry >> KEY_SHIFT & 0xF) & (PKRU_AD | PKRU_WD)


def _shadow_stack(
    paging: Paging, access: Access, walk: Walk, dimensions: list[_Dimension], mode: str
) -> Iterator[Cell]:
    """A reference to a shadow stack is one more case of the rules that are about those, and of no others."""
    reached = isinstance(walk.outcome, Reached)
    for dimension, name, steps in dimensions:
        rule = "guest.shadow-stack" if dimension == GUEST else "nested.sss"
        if walk.rule == rule:
            yield Cell(rule, dimension, steps[-1].level, mode, f"{_vector(walk)} {_who(access)}")
        elif reached and (name == GUEST or (paging.sss and not paging.gmet and not access.user)):
            yield Cell(rule, dimension, steps[-1].level, mode, f"permitted, {_who(access)}")


def _lacking(steps: list[_Seen], right: int) -> list[_Seen]:
    """The entries that do not give `right`, of those that decide over it; NX is a right that is given by 0."""
    given = 0 if right == NX else right
    return [step for step in steps if (step[1] ^ given) & right & ~step[2].granted]


def reserved(level: Level, entry: int) -> set[str]:
    """What is reserved in a present entry, as the manual would say it."""
    leaf = bool(entry & level.leaf)
    bits = entry & (level.reserved_leaf if leaf else level.reserved_table)
    if level.granted:  # a PAE PDPTE: most of its low bits must be zero
        bits, low = bits & ~0xFFF, bits & 0xFFF
        reasons = {"low bits"} if low else set()
    else:
        reasons = set()
    for mask, name in _RESERVED:
        if bits & mask:
            reasons.add(name)
            bits &= ~mask
    high = bits & FRAME & ~0xFFFF_FFFF
    if level.shift == 22:  # 4M: address bits 39:32 are its bits 20:13
        high, bits = bits & 0x1F_E000, bits & ~0x1F_E000
    if high:
        reasons.add("beyond MAXPHYADDR")
    if bits & 0xFFFF_FFFF:
        reasons.add("low frame bits")
    return reasons


def _updated(paging: Paging, access: Access, walk: Walk, mode: str) -> Iterator[Cell]:
    """Accessed and dirty bits that this walk sets: those that were clear when it first came to their entry."""
    first = {step[3]: step for step in reversed(walk.trail)}
    clear = set()
    for address, bits, _ in walk.updates:
        step = first.pop(address, None)
        if step is not None and bits & ~step[4]:
            dimension, name, purpose, _, entry = step
            clear.add((dimension, name, purpose == FINAL, entry & PS, bits & ~entry))
    faulted = not isinstance(walk.outcome, Reached)
    for dimension, name, final, large, bits in clear:
        fmt = paging.guest if dimension == GUEST else paging.nested
        assert fmt is not None
        level = level_name(next(level for level in fmt.levels if level.name == name), P | large)
        if dimension != GUEST:
            dimension = NESTED_PAGE if final else NESTED_TABLE
        how = " before a fault" if faulted else "" if dimension == NESTED_TABLE else f" by {_kind(access)}"
        if bits & ~D:
            yield Cell("ad", dimension, level, mode, f"A{how}")
        if bits & D:
            yield Cell("ad", dimension, level, mode, f"D{how}")


def _kind(access: Access) -> str:
    return "fetch" if access.fetch else "write" if access.write else "read"


def _who(access: Access, dimension: str = "") -> str:
    """`user read`; in the nested dimension, where every access is a user's, without saying whose."""
    if dimension == NESTED_PAGE:
        return _kind(access)
    what = f"shadow stack {_kind(access)}" if access.shadow_stack else _kind(access)
    return f"{'user' if access.user else 'supervisor'} {what}"


def _vector(walk: Walk) -> str:
    return _VECTORS[type(walk.outcome)]
