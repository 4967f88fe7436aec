"""Smaller scenarios: what can be left out of one, or be made plainer.

`candidates` knows nothing of what the scenario shows: whoever asks tries them (harness.shrinking). Each costs less than
the scenario that it is of, so that shrinking ends; the order is fixed, the boldest cuts first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from harness.scenario.modes import HOST_MODES, MODES
from harness.scenario.ops import (
    DEFAULT_PAGE_SIZE,
    MEMORY,
    NO_NESTED_PAGING,
    REQUESTS,
    SIZED,
    STORES,
    Change,
    EntryOp,
    HostOp,
    InvlpgaOp,
    Op,
    Probe,
    RunOp,
    Scenario,
    UseOp,
    VmcbOp,
)
from harness.scenario.world import PAGES

T = TypeVar("T")
Cost = tuple[int, int, int, int, int]

_GUESTS: Final = ("4-level", "PAE", "32-bit", "5-level", "off", "real")
_HOSTS: Final = ("4-level", "PAE", "32-bit", "5-level", "off")
"""Modes, the plainest first: the usual one, then those with fewer levels."""
_SIZES: Final = ("4K", "2M", "4M", "1G", NO_NESTED_PAGING)
_LEAVES: Final = {"4K": "pte", "2M": "pde", "4M": "pde", "1G": "pdpte"}
_KINDS: Final = ("read", "write", "fetch", "rmw", "pop", "push", "invlpg")
"""Probes of memory, the plainest first."""
_PLAIN: Final = 3
"""How many of these another one may become."""


def bare(scenario: Scenario) -> Scenario:
    """Without what is for the reader of its file: what is expected, and where it was read."""
    return replace(scenario, source="", lines=(), ops=tuple(
        replace(op, expect=()) if isinstance(op, RunOp) else op for op in scenario.ops))


def cost(scenario: Scenario) -> Cost:
    """How much there is to understand: ops, probes, the modes, bits that are changed, and odd places and kinds."""
    runs = [op for op in scenario.ops if isinstance(op, RunOp)]
    probes = [probe for op in runs for probe in op.probes]
    modes = _GUESTS.index(scenario.guest) + _HOSTS.index(scenario.nested) + sum(
        _SIZES.index(size) for size in (scenario.guest_page, scenario.nested_page, scenario.table_page))
    return (len(scenario.ops), len(probes), modes, sum(map(_bits, scenario.ops)),
            sum(map(_oddness, scenario.ops)) + sum(op.cpl for op in runs))


def candidates(scenario: Scenario) -> Iterator[Scenario]:
    """All that cost less, each once. Not all make sense: the model says which."""
    seen = {scenario}
    limit = cost(scenario)
    for make in (_fewer_ops, _fewer_probes, _plainer_world, _fewer_vmcbs, _merged, _fewer_bits, _plainer_places,
                 _plainer_probes):
        for candidate in make(scenario):
            if candidate not in seen and candidate.ops and cost(candidate) < limit:
                seen.add(candidate)
                yield candidate


# --- cost -----------------------------------------------------------------------------------------


def _bits(op: Op) -> int:
    if not isinstance(op, EntryOp | VmcbOp | HostOp):
        return 0
    change = op.change
    number = 0 if change.value is None else 1 + change.value.bit_count()
    return number + len(change.set) + len(change.clear)


def _oddness(op: Op) -> int:
    match op:
        case EntryOp(entry, _, frame, second):
            return _far(entry.split(".")[1:2]) + (frame is not None) + _far([frame]) + second
        case VmcbOp(_, _, page, frame):
            return sum((name is not None) + _far([name]) for name in (page, frame))
        case InvlpgaOp(page, _):
            return _far([page])
        case UseOp(number):
            return number
        case RunOp(probes):
            return sum(map(_odd, probes))
    return 0


def _far(names: Sequence[str | None]) -> int:
    return sum(PAGES.index(name) for name in names if name in PAGES)


def _odd(probe: Probe) -> int:
    kind = _KINDS.index(probe.kind) if probe.kind in _KINDS else len(_KINDS)
    target = 8 if probe.target[:1].isdigit() else _far([probe.target])
    value = 0 if probe.value is None else 1 + (probe.value.bit_count() if isinstance(probe.value, int) else 1)
    return kind + target + probe.offset.bit_count() + bool(probe.size) + value


# --- candidates -----------------------------------------------------------------------------------


def without_chunks(items: Sequence[T]) -> Iterator[tuple[T, ...]]:
    """`items` without a half of them, a quarter, and so on down to one; what comes last goes first."""
    size = len(items)
    while size > 1:
        size = (size + 1) // 2
        for end in range(len(items), 0, -size):
            yield (*items[: max(0, end - size)], *items[end:])
    if len(items) == 1:
        yield ()


def _fewer_ops(scenario: Scenario) -> Iterator[Scenario]:
    for ops in without_chunks(scenario.ops):
        yield replace(scenario, ops=ops)


def _with(scenario: Scenario, index: int, op: Op) -> Scenario:
    return replace(scenario, ops=(*scenario.ops[:index], op, *scenario.ops[index + 1 :]))


def _fewer_probes(scenario: Scenario) -> Iterator[Scenario]:
    for index, op in enumerate(scenario.ops):
        if isinstance(op, RunOp):
            for probes in without_chunks(op.probes):
                yield _with(scenario, index, replace(op, probes=probes))


def _plainer_world(scenario: Scenario) -> Iterator[Scenario]:
    """Another mode, or pages of another size; entries keep their names, or are the leaves that take their place."""
    worlds = [{"guest": _GUESTS[0], "nested": _HOSTS[0]}]
    worlds += [{"guest": mode} for mode in _GUESTS] + [{"nested": mode} for mode in _HOSTS]
    worlds += [{key: size} for size in _SIZES for key in ("guest_page", "nested_page", "table_page")]
    for world in worlds:
        changed = _with_sizes(replace(scenario, **world))  # type: ignore[arg-type]
        yield changed
        yield _renamed(changed, lambda name, changed=changed: _moved(name, scenario, changed))  # type: ignore[misc]


def _with_sizes(scenario: Scenario) -> Scenario:
    """Where a mode has no pages of that size, the usual ones."""
    sizes = {"guest_page": MODES[scenario.guest].pages, "nested_page": HOST_MODES[scenario.nested].pages,
             "table_page": HOST_MODES[scenario.nested].pages}
    fitting = {key: DEFAULT_PAGE_SIZE for key, known in sizes.items()
               if getattr(scenario, key) not in (*known, NO_NESTED_PAGING)}
    return replace(scenario, **fitting)  # type: ignore[arg-type]


def _moved(name: str, old: Scenario, new: Scenario) -> str:
    """An entry's name in another world: a leaf stays one, and the root's entry too."""
    dimension, what, level = f"{name}..".split(".")[:3]
    if dimension not in ("guest", "nested"):
        return name
    key = "guest_page" if dimension == "guest" else "nested_page" if what in PAGES else "table_page"
    if what in PAGES or f"{what}e" in _LEAVES.values() or what in ("pml4", "pml5"):
        before, after = (_LEAVES.get(getattr(world, key), "pte") for world in (old, new))
        level = after if level == before else level
    if (new.guest if dimension == "guest" else new.nested) != "5-level":
        level = level.replace("pml5e", "pml4e")
    return f"{dimension}.{what}.{level}"


def _renamed(
    scenario: Scenario, entry: Callable[[str], str], page: Callable[[str], str] = lambda name: name
) -> Scenario:
    """With other names of entries (`guest.a.pte`) and of pages."""

    def maybe(name: str | None) -> str | None:
        return page(name) if name is not None else None

    def value(text: int | str | None) -> int | str | None:
        if not isinstance(text, str):
            return text
        name, *changes = re.split(r"(?=[+-])", text[1:])
        name, at, frame = name.partition("@")
        return f"&{entry(name)}{at}{page(frame)}{''.join(changes)}"

    def target(name: str) -> str:
        return entry(name) if "." in name else page(name)

    def op(one: Op) -> Op:
        match one:
            case EntryOp():
                return replace(one, entry=entry(one.entry), frame=maybe(one.frame))
            case VmcbOp():
                return replace(one, page=maybe(one.page), frame=maybe(one.frame))
            case InvlpgaOp():
                return replace(one, page=page(one.page))
            case RunOp():
                return replace(one, probes=tuple(
                    replace(p, target=target(p.target), value=value(p.value)) for p in one.probes))
        return one

    return replace(scenario, ops=tuple(map(op, scenario.ops)))


def _fewer_vmcbs(scenario: Scenario) -> Iterator[Scenario]:
    numbers = sorted({op.number for op in scenario.ops if isinstance(op, UseOp)})
    if not numbers:
        return
    yield replace(scenario, ops=tuple(op for op in scenario.ops if not isinstance(op, UseOp)))
    for number in numbers:
        for other in range(1, number):
            yield replace(scenario, ops=tuple(
                UseOp(other) if op == UseOp(number) else op for op in scenario.ops))


def _merged(scenario: Scenario) -> Iterator[Scenario]:
    """Two ops made one: runs at the same CPL, changes of the same thing."""
    ops = scenario.ops
    for index, op in enumerate(ops):
        for other in range(index + 1, len(ops)):
            one = _both(op, ops[other])
            if one is not None:
                rest = (*ops[index + 1 : other], *ops[other + 1 :])
                yield replace(scenario, ops=(*ops[:index], one, *rest))
                yield replace(scenario, ops=(*ops[:index], *ops[index + 1 : other], one, *ops[other + 1 :]))


def _both(one: Op, other: Op) -> Op | None:
    match one, other:
        case RunOp(), RunOp() if one.cpl == other.cpl:
            return replace(one, probes=one.probes + other.probes)
        case EntryOp(), EntryOp() if (one.entry, one.second) == (other.entry, other.second):
            return replace(other, change=_then(one.change, other.change), frame=other.frame or one.frame)
        case VmcbOp(), VmcbOp() if one.field == other.field:
            return replace(other, change=_then(one.change, other.change), page=other.page or one.page,
                           frame=other.frame or one.frame)
        case HostOp(), HostOp() if one.register == other.register:
            return replace(other, change=_then(one.change, other.change))
    return None


def _then(one: Change, other: Change) -> Change:
    if other.value is not None:
        return other
    return Change(one.value, tuple(bit for bit in one.set if bit not in other.clear + other.set) + other.set,
                  tuple(bit for bit in one.clear if bit not in other.set + other.clear) + other.clear)


def _fewer_bits(scenario: Scenario) -> Iterator[Scenario]:
    for index, op in enumerate(scenario.ops):
        if isinstance(op, EntryOp | VmcbOp | HostOp):
            elsewhere = isinstance(op, EntryOp | VmcbOp) and (op.frame or (isinstance(op, VmcbOp) and op.page))
            for change in _smaller(op.change):
                if change != Change() or elsewhere:
                    yield _with(scenario, index, replace(op, change=change))


def _smaller(change: Change) -> Iterator[Change]:
    for names in without_chunks(change.set):
        yield replace(change, set=names)
    for names in without_chunks(change.clear):
        yield replace(change, clear=names)
    if change.value is not None:
        yield replace(change, value=None)
        for value in _numbers(change.value):
            yield replace(change, value=value)


def _numbers(value: int) -> Iterator[int]:
    """`value` with fewer bits set."""
    bits = [1 << n for n in range(value.bit_length()) if value >> n & 1]
    for kept in without_chunks(bits):
        yield sum(kept)


def _plainer_places(scenario: Scenario) -> Iterator[Scenario]:
    for page in reversed(PAGES):
        for other in PAGES[: PAGES.index(page)]:
            moved = {page: other}
            yield _on_pages(scenario, moved)
            yield _on_pages(scenario, moved | {other: page})
    for index, op in enumerate(scenario.ops):
        match op:
            case EntryOp():
                if op.second:
                    yield _with(scenario, index, replace(op, second=False))
                if op.frame is not None and op.change != Change():
                    yield _with(scenario, index, replace(op, frame=None))
            case VmcbOp():
                for key in ("page", "frame"):
                    if getattr(op, key) is not None and op.change != Change():
                        yield _with(scenario, index, replace(op, **{key: None}))  # type: ignore[arg-type]
            case RunOp():
                if op.cpl:
                    yield _with(scenario, index, replace(op, cpl=0))


def _on_pages(scenario: Scenario, moved: dict[str, str]) -> Scenario:
    def page(name: str) -> str:
        return moved.get(name, name)

    def entry(name: str) -> str:
        return ".".join(map(page, name.split(".")))

    return _renamed(scenario, entry, page)


def _plainer_probes(scenario: Scenario) -> Iterator[Scenario]:
    for index, op in enumerate(scenario.ops):
        if isinstance(op, RunOp):
            for number, probe in enumerate(op.probes):
                for plainer in _plainer(probe):
                    probes = (*op.probes[:number], plainer, *op.probes[number + 1 :])
                    yield _with(scenario, index, replace(op, probes=probes))


def _plainer(probe: Probe) -> Iterator[Probe]:
    if probe.kind in MEMORY:
        for kind in _KINDS[:_PLAIN]:
            yield replace(probe, kind=kind, value=probe.value if kind in STORES else None,
                          size=probe.size if kind in SIZED else 0)
    if probe.kind in REQUESTS:
        yield replace(probe, kind="remote")
    if probe.target[:1].isdigit() and probe.kind in MEMORY:
        yield replace(probe, target=PAGES[0], offset=0)
    if probe.size:
        yield replace(probe, size=0)
    for offset in _numbers(probe.offset):
        yield replace(probe, offset=offset)
    if probe.value is not None and probe.kind in STORES:
        yield replace(probe, value=None)
    if isinstance(probe.value, int):
        for value in _numbers(probe.value):
            yield replace(probe, value=value)
