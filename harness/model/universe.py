"""Which cells there are: computed by walking, not listed.

For every pair of table formats the model walks small tables in which all is permitted, and then the same
tables with one entry changed by one bit, for every kind of access and in every register state that a rule
depends on. What the walks reach are the cells that can be reached on this processor; and a rule that is new in
the walk has its cells as soon as `GUEST_STATES` or `NESTED_STATES` has the state in which it decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import product
from typing import Final, NamedTuple

from harness.model.access import Access, Reached
from harness.model.coverage import (
    BOTH,
    NESTED_PAGE,
    NESTED_TABLE,
    NONE,
    OFF,
    Cell,
    cells_of,
    level_name,
)
from harness.model.dirty import write_back
from harness.model.entries import NX, PS, RW, US, D, Format, P
from harness.model.intercepts import INTERCEPTS
from harness.model.registers import PKRU_AD, PKRU_WD, Cpu
from harness.model.rules import RULES, Rule
from harness.model.specimens import (
    TABLES,
    Tables,
    Words,
    build,
    changed,
    formats,
    leaves,
    name_of,
    pairs,
    reserved_bits,
)
from harness.model.vmcb import ExitCode
from harness.model.walk import FINAL, GUEST, NESTED, Paging, translate

ACCESSES: Final = tuple(
    Access(write, fetch, user)
    for write, fetch in ((False, False), (True, False), (False, True)) for user in (False, True)
)
_IMPLICIT: Final = Access(implicit=True)
_STACK: Final = tuple(access._replace(stack=True) for access in ACCESSES if not access.fetch)
_SHADOW: Final = tuple(access._replace(shadow_stack=True) for access in ACCESSES if not access.fetch)


_State = Callable[[Paging], Paging]
"""Registers that a rule depends on, over those with which all is permitted."""


def _base(paging: Paging) -> Paging:
    return paging


def _keys(pkru: int, wp: bool = True) -> _State:
    """PKRU with CR4.PKE=1, which is nothing outside of long mode; entries here have key 0."""

    def change(paging: Paging) -> Paging:
        long = paging.guest is not None and paging.guest.address_bits > 32
        return paging._replace(pkru=pkru, wp=wp) if long else paging

    return change


GUEST_STATES: Final[tuple[_State, ...]] = (
    _base,
    lambda paging: paging._replace(wp=False),
    lambda paging: paging._replace(smep=True),
    lambda paging: paging._replace(smap=True),
    lambda paging: paging._replace(smap=True, ac=True),
    _keys(PKRU_AD),
    _keys(PKRU_WD),
    _keys(PKRU_WD, wp=False),
)
NESTED_STATES: Final[tuple[_State, ...]] = (_base, lambda paging: paging._replace(gmet=True))
"""The states in which the rules of that dimension decide: add that of a new rule."""

_SHADOW_STATES: Final[tuple[_State, ...]] = (_base, lambda paging: paging._replace(sss=True))

FEATURES: Final = tuple(dict.fromkeys(("la57", *(feature for rule in RULES.values() for feature in rule.needs))))
"""CPUID features that cells may need: those of their rules, and that of 5-level paging."""

NO_CELLS: Final = {
    rule.id: reason for rule in RULES.values() for where, reason in rule.never if not where
}
"""Rules that no run can put to the test, and why."""

_INTERCEPTED: Final = sorted(
    {one.exitcode for one in INTERCEPTS.values()} - {INTERCEPTS[name].exitcode for name in (
        "intr", "nmi", "smi", "init", "vintr", "task-switch", "ferr-freeze", "shutdown", "vmmcall",
        *(f"{kind}{n}" for n in range(16) for kind in ("rdcr", "wrcr") if n not in (0, 2, 3, 4)),
        *(f"{kind}{n}" for n in range(16) for kind in ("rddr", "wrdr") if n not in (6, 7)))}
)
"""Exits of instructions that L2 has in all modes."""

_EXITS: Final = (
    ("exit.vmmcall", "VMEXIT_VMMCALL"),
    *(("exit.intercept", f"VMEXIT_{name}") for name in ("VMRUN", "VMLOAD", "VMSAVE", "STGI", "CLGI")),
    ("exit.privileged", "VMEXIT_#GP"),
    ("exit.host", "#VMEXIT"),
    ("exit.host-dr7", "#VMEXIT"),
    ("exit.registers", "#VMEXIT"),
)
"""Rules of #VMEXIT that hold in every pair of modes, and their outcomes."""

_INSTRUCTIONS: Final = (
    *(("exit.intercept", ExitCode.describe(code)) for code in _INTERCEPTED),
    *(("exit.exception", f"VMEXIT_EXCP{vector}") for vector in (0, 3, 6)),
    ("exit.debug", "VMEXIT_EXCP1"),
)
"""Rules of #VMEXIT that hold in every mode of L2, whatever L1's is, and their outcomes."""

DELIVERIES: Final = ("#PF", "#GP", "exception", "interrupt", "NMI", "software interrupt")
"""What goes through L2's own IDT, as `exit.delivered` has it."""

_FAILED: Final = (
    *(("exit.delivery", f"{what} raises {second}") for what in DELIVERIES for second in ("#GP", "#NP")),
    *(("exit.double-fault", outcome) for outcome in ("#DF behind #PF", "#DF behind #GP", "shutdown behind #DF")),
)
"""Deliveries that raise an exception themselves: what they find in the IDT does not depend on the modes."""


class Universe(NamedTuple):
    """`reachable` are the cells of a processor, `lacking` those that it could have with a feature that it has not:
    each with that feature."""

    reachable: frozenset[Cell]
    lacking: dict[Cell, str]


class Gap(NamedTuple):
    """Cells that there are not: a rule that cannot decide at a level in a pair of modes, and the reason."""

    rule: str
    dimension: str
    level: str
    mode: str
    reason: str


@lru_cache(maxsize=8)
def universe(cpu: Cpu) -> Universe:
    """The cells of a processor."""
    reachable, lacking = set(), {}
    for cell in _all(cpu._replace(features=frozenset(), asids=0)):
        needs = (*RULES[cell.rule].needs, *["la57"] * ("5-level" in cell.mode))
        missing = [feature for feature in needs if feature not in cpu.features]
        if missing:
            lacking[cell] = missing[0]
        else:
            reachable.add(cell)
    return Universe(frozenset(reachable), lacking)


@lru_cache(maxsize=8)
def _all(cpu: Cpu) -> frozenset[Cell]:
    """The cells of a processor like that one, with whatever features."""
    return frozenset(_everything(cpu))


def _everything(cpu: Cpu) -> Iterator[Cell]:
    for guest, nested in pairs(cpu):
        yield from _walks(cpu, guest, nested)
        mode = f"{name_of(guest) or OFF}/{name_of(nested) or NONE}"
        for rule, outcome in _EXITS:
            yield Cell(rule, "", "", mode, outcome)
        for rule, outcome in _INSTRUCTIONS if nested is not None and nested.name == "4-level" else ():
            yield Cell(rule, "", "", mode, outcome)
        if guest is not None and guest.address_bits > 32:  # the model has deliveries in long mode
            for outcome in _deliveries(nested is not None):
                yield Cell("exit.delivered", "", "", mode, outcome)
    for rule, outcome in _FAILED:
        yield Cell(rule, "", "", "", outcome)
    for check in RULES:
        if check.startswith("vmrun.") and check not in NO_CELLS:
            yield Cell(check, "", "", "", "refused")


def _deliveries(nested: bool) -> Iterator[str]:
    """Deliveries that came to their handler, and those that faulted on the way (a second #PF could only leave
    L2 where the first one had)."""
    for what in DELIVERIES:
        yield what
        if what != "#PF":
            yield f"{what} cut short by VMEXIT_#PF"
        if nested:
            yield f"{what} cut short by VMEXIT_NPF"


# --- the walks --------------------------------------------------------------------------------------


def _walks(cpu: Cpu, guest: Format | None, nested: Format | None) -> Iterator[Cell]:
    """The cells of one pair of formats."""
    without_nx = {fmt.name: fmt for fmt in formats(cpu, nxe=False)}
    for guest_leaf, nested_leaf in product(leaves(guest), leaves(nested)):
        tables = build(cpu, guest, nested, guest_leaf, nested_leaf)
        yield from _look(tables, tables.words, (*ACCESSES, _IMPLICIT), (*GUEST_STATES, *NESTED_STATES))
        yield from _shadow_stacks(tables)
        walk = translate(tables.paging, tables.words, tables.gva, Access())
        table = next((step.purpose for step in walk.steps if step.purpose not in ("", FINAL)), "")
        for step in walk.steps:
            own = step.dimension == GUEST
            if own and nested_leaf != leaves(nested)[0]:
                continue  # the nested page's size changes nothing in the guest dimension
            if step.purpose not in ("", FINAL) and (step.purpose != table or guest_leaf != leaves(guest)[0]):
                continue  # one guest table stands for all
            fmt = guest if own else nested
            assert fmt is not None
            loaded = own and fmt.name == "PAE" and step.level == "pdpte" and nested is None  # and checked by VMRUN
            for bit in (P,) if loaded else (P, RW, US, NX):
                words = changed(tables.words, step.address, step.entry ^ bit, fmt)
                yield from _look(tables, words, ACCESSES, GUEST_STATES if own else NESTED_STATES)
                if bit == NX and fmt.entry_shift == 3:
                    paging = tables.paging
                    paging = paging._replace(guest=without_nx[fmt.name]) if own else (
                        paging._replace(nested=without_nx[fmt.name]))
                    yield from _look(tables._replace(paging=paging), words, ACCESSES, (_base,))
            for bits in () if loaded else reserved_bits(fmt, step.level, step.entry):
                words = changed(tables.words, step.address, step.entry ^ bits, fmt)
                yield from _look(tables, words, ACCESSES, (_base,))
    if guest is not None and guest.address_bits > 32:
        beyond = tables._replace(gva=1 << guest.address_bits - 1)
        yield from _look(beyond, tables.words, ACCESSES + _STACK, (_base,))


def _shadow_stacks(tables: Tables) -> Iterator[Cell]:
    """The same tables with the page made a shadow stack, of either privilege, and left as it is."""
    guest, nested = tables.paging.guest, tables.paging.nested
    if guest is None:
        return  # without paging no page is a shadow stack
    walk = translate(tables.paging, tables.words, tables.gva, Access())
    leaf = {step.dimension: step for step in walk.steps}
    step = leaf[GUEST]
    bases = [changed(tables.words, step.address, step.entry & ~RW & ~us | D, guest) for us in (0, US)]
    bases.append(tables.words)
    if nested is not None:
        step = leaf[NESTED]
        bases += [changed(words, step.address, step.entry & ~US | NX, nested) for words in bases]
    for words in bases:
        yield from _look(tables, words, _SHADOW, _SHADOW_STATES)


def _look(
    tables: Tables, words: Words, accesses: Iterable[Access], states: Iterable[_State]
) -> Iterator[Cell]:
    for state in states:
        paging = state(tables.paging)
        for access in accesses:
            if paging.guest is None:
                yield from _without_paging(paging, words, tables.gva, access)
            elif access.fetch or _runs(paging, words, access):
                yield from cells_of(paging, access, translate(paging, words, tables.gva, access))


def _runs(paging: Paging, words: Words, access: Access) -> bool:
    """Whether L2 comes to make `access`: its own page of code, and that of its results, lie behind the same upper
    nested entries as its tables. What they fault with is what a fetch of the page would."""
    own = paging._replace(guest=None)
    return all(isinstance(translate(own, words, TABLES, one).outcome, Reached) for one in _own(access))


def _own(access: Access) -> tuple[Access, Access]:
    return Access(fetch=True, user=access.user), Access(write=True, user=access.user)


def _without_paging(paging: Paging, words: Words, gva: int, access: Access) -> Iterator[Cell]:
    """All that L2 has lies behind the same upper entries, below 4 GiB: they are set and fault for L2's own first."""
    words = Words(words)
    own = []
    for one in _own(access):
        walk = translate(paging, words, TABLES, one)
        write_back(words, walk.updates)
        own.append((one, walk))
    (fetch, fetched), (_, written) = own
    if isinstance(fetched.outcome, Reached) and not isinstance(written.outcome, Reached):
        return  # nothing that is checked
    yield from cells_of(paging, fetch, fetched)
    if isinstance(fetched.outcome, Reached):
        yield from cells_of(paging, access, translate(paging, words, gva, access))


# --- what cannot be reached --------------------------------------------------------------------------


def gaps(cpu: Cpu) -> list[Gap]:
    """Rules that never decide, and where a rule of the walk cannot, though it does at such entries in other modes.
    The reason stands beside the rule (`Rule.never`); it is empty where none is given, which is a mistake there."""
    found = universe(cpu)
    cells = [cell for cell in found.reachable | found.lacking.keys() if cell.level and cell.dimension != BOTH]
    places = {(cell.rule, cell.dimension, cell.level, cell.mode) for cell in cells}
    kinds = {(cell.rule, cell.dimension[:6], _kind(cell.level)) for cell in cells}
    return [Gap(rule, "", "", "", reason) for rule, reason in NO_CELLS.items()] + [
        Gap(rule, dimension, level, mode,
            _reason(RULES[rule], dimension, fmt.name, level, *[OFF] * (guest is None), *[NONE] * (nested is None)))
        for guest, nested in pairs(cpu)
        for mode in (f"{name_of(guest) or OFF}/{name_of(nested) or NONE}",)
        for dimension, fmt in ((GUEST, guest), (NESTED_PAGE, nested), (NESTED_TABLE, nested if guest else None))
        if fmt is not None
        for level in _levels(fmt)
        for rule in RULES
        if (rule, dimension[:6], _kind(level)) in kinds and (rule, dimension, level, mode) not in places
    ]


def _levels(fmt: Format) -> Iterator[str]:
    """The names that a format's levels have in cells: of pointers to tables, and of pages."""
    for level in fmt.levels:
        for entry in sorted({0, level.leaf & PS} if level.leaf != P else {P}):
            yield level_name(level, entry | P)


def _kind(level: str) -> str:
    return "large" if " " in level else "pte" if level == "pte" else "upper"


def _reason(rule: Rule, *place: str) -> str:
    """Why, by the first pattern of the rule whose words are all of that place's."""
    words = {word for text in place for word in text.split()}
    return next((why for where, why in rule.never if set(where.split()) <= words), "")
