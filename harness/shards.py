"""Shards: a campaign's work in parts that any host can do, and what came of all of them.

A shard is a command line of twinwalk, `run --shard 3/8 ...` or `fuzz --seed 5 ...`, and its answer that command's
`--json` object. So each can be repeated by hand. Answers come from other hosts: only figures and words are taken from
them, each held against what it must be.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from harness.lockstep.signature import Signature
from harness.model.coverage import Cell
from harness.report.styled import harmless
from harness.typed_json import decode

WORTH: Final = 4_000
"""Scenarios and cases in a shard, where nobody says how many shards: many times what a boot costs."""
SUMS: Final = ("scenarios", "sweep_cases", "vmruns", "probes", "table_bytes_compared", "contexts_checked",
               "trace_events", "divergences_new", "divergences_known", "stale_permitted", "stale_seen")
"""Totals of a run that are added up."""
OTHER_EDITION: Final = "other edition"
"""What a worker says that has another twinwalk."""
_LONGEST: Final = 2_000
"""Characters of a text of another host that are kept."""

Shard = tuple[str, ...]
"""A command line, without what says where results go."""


def of_run(options: Sequence[str], things: int, parts: int | None) -> Iterator[Shard]:
    """A run of `things` scenarios and cases, in `parts`."""
    parts = parts or math.ceil(things / WORTH)
    for number in range(1, parts + 1):
        yield ("run", f"--shard={number}/{parts}", *options)


def of_fuzz(options: Sequence[str], seeds: Sequence[int], programs: int) -> Iterator[Shard]:
    """So many generated programs of each seed."""
    for seed in seeds:
        yield ("fuzz", f"--seed={seed}", f"--budget={programs}", *options)


class Find(NamedTuple):
    """What is new in a shard: how often, the first scenario that shows it, and what is wrong in a sentence."""

    signature: Signature
    times: int
    scenario: str
    what: str


class Answer(NamedTuple):
    """What a shard came to. `machine` is its identity in words; `cells` of the coverage table were reached."""

    machine: str
    totals: dict[str, int]
    finds: list[Find]
    cells: set[Cell]


def answer(document: Any) -> Answer:
    """Of a `--json` object. Raises ValueError where that is none."""
    try:
        totals = {name: _figure(document["totals"][name]) for name in SUMS}
        finds = [
            Find(Signature(*(_words(one[name]) for name in Signature._fields)), _figure(one["count"]),
                 _words(one["scenario"]), _words(one["what"]))
            for one in document["findings"]
        ]
        cells = {decode(Cell, ["Cell", *cell]) for cell in document["cells"]}
        return Answer(_machine(document["machine"]), totals, finds, cells)
    except (KeyError, TypeError, AttributeError) as reason:
        raise ValueError(f"{type(reason).__name__}: {reason}") from None


def _figure(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a number is wanted, not {str(value)[:60]!r}")
    return value


def _words(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"text is wanted, not {str(value)[:60]!r}")
    return harmless(value[:_LONGEST])


def _machine(value: Any) -> str:
    """The parts of an identity that tell builds apart; of a journal they are words already."""
    if value is None or isinstance(value, str):
        return _words(value or "")
    names = ("machine", "qemu_version", "kernel", "kernel_version", "cpu_model", "microcode")
    return ", ".join(f"{name} {_words(str(value[name]))}" for name in names if value.get(name))


@dataclass
class Merged:
    """All answers taken together. `finds` has what is new once for each signature, with the shard that showed it first;
    `failed` shards have no answer, but a reason."""

    totals: Counter[str] = field(default_factory=Counter)
    finds: dict[Signature, tuple[Find, Shard]] = field(default_factory=dict)
    machines: Counter[str] = field(default_factory=Counter)
    cells: set[Cell] = field(default_factory=set)
    failed: dict[Shard, str] = field(default_factory=dict)
    done: set[Shard] = field(default_factory=set)

    def add(self, shard: Shard, one: Answer) -> list[Find]:
        """What is new in it that no shard had shown."""
        if shard in self.done:
            return []
        self.done.add(shard)
        self.totals.update(one.totals)
        if one.machine:
            self.machines[one.machine] += 1
        self.cells |= one.cells
        news = []
        for find in one.finds:
            first, where = self.finds.get(find.signature, (find._replace(times=0), shard))
            news += [find] if not first.times else []
            self.finds[find.signature] = first._replace(times=first.times + find.times), where
        return news

    def fail(self, shard: Shard, reason: str) -> None:
        """A shard that has no result, and why."""
        self.failed[shard] = harmless(reason[-_LONGEST:])
