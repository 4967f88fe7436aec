"""Programs that nobody wrote: of some twenty ops, in one world, aimed at a cell of the coverage table or changed from
one that showed something new.

Pure: the same `Draw` makes the same program. What comes out is valid as far as the vocabulary knows; the rehearsal on
the model has the last word (harness.steering).
"""

from __future__ import annotations

from typing import Final

from harness.model.coverage import Cell
from harness.scenario.aims import Aim, Key, aim
from harness.scenario.draws import Draw
from harness.scenario.ops import Op, RunOp, Scenario, UseOp

TITLE: Final = "A generated program"
MANUAL: Final = "15"
SHOWS: Final = "Whatever the machine does otherwise than the model"
_ROUNDS: Final = (2, 3, 3, 4)
_CHANGES: Final = (2, 3, 4, 5, 6)
_LONGEST: Final = 30


def scenario(name: str, key: Key, ops: list[Op]) -> Scenario:
    """A generated program with its name, in the world of `key`."""
    guest, nested, guest_page, nested_page, table_page = key
    return Scenario(name, TITLE, MANUAL, SHOWS, tuple(ops), guest, nested, guest_page, nested_page,
                    table_page=table_page)


def program(draw: Draw, cell: Cell | None) -> list[Op]:
    """Rounds of changes, each with a run behind them; the first run, or the last, is aimed at `cell`."""
    rounds = draw.one(_ROUNDS)
    at = -1
    target = Aim()
    if cell is not None:
        target = aim(cell, draw)
        at = rounds - 1 if target.last else 0
    ops: list[Op] = []
    for number in range(rounds):
        aimed = number == at
        if not (aimed and number == 0):
            for _ in range(draw.one(_CHANGES)):
                ops += draw.change()
        if aimed:
            ops += target.ops
            more, probes = draw.probes(target.cpl)
            ops.append(RunOp((*target.probes, *probes[:2]), target.cpl))
            ops[-1:-1] = [] if target.last else more
        else:
            ops += run(draw)
    return ops


def run(draw: Draw) -> list[Op]:
    """A run, and what must come before it."""
    cpl = draw.one((0, 0, 3))
    before, probes = draw.probes(cpl)
    return [*before, RunOp(tuple(probes), cpl)]


def changed(draw: Draw, ops: tuple[Op, ...]) -> list[Op]:
    """A program that is another one, with some ops left out, put in, or taken twice."""
    out = list(ops)
    draw.used |= {op.number for op in out if isinstance(op, UseOp)}
    for _ in range(draw.one((1, 1, 2, 3))):
        dice = draw.random.random()
        at = int(draw.random.random() * len(out))
        if dice < 0.3 and len(out) > 3:
            del out[at]
        elif dice < 0.7:
            out[at:at] = draw.change()
        elif dice < 0.85:
            out[at:at] = run(draw)
        else:
            out.insert(at, draw.one(out))
    if not any(isinstance(op, RunOp) for op in out):
        out += run(draw)
    while out and not isinstance(out[-1], RunOp):  # nothing would see what those do
        out.pop()
    return out[-_LONGEST:]
