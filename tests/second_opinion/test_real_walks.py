"""QEMU's emulated MMU (mmu_translate) over random tables in both dimensions, through real L1 and L2 guests.

It judges what a debugging walk cannot: reserved bits, NX, the nested dimension and its error codes, the
order of faults, accessed and dirty bits. It is the code that `twinwalk run` is about, so its errata apply;
what is new here is that nobody chose the tables. A difference without an erratum is a fault of the
model, or an erratum to be written.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from harness.errors import UsageError
from harness.lockstep.driver import Lockstep
from harness.lockstep.errata import Erratum
from harness.lockstep.rehearse import rehearse
from harness.lockstep.twin import Twin
from harness.machine import tcg
from harness.machine.tcg import TcgMachine
from harness.scenario.modes import HOST_MODES, MODES
from harness.scenario.ops import NO_NESTED_PAGING, Change, EntryOp, HostOp, Op, Probe, RunOp, Scenario, VmcbOp
from harness.scenario.program import Compiler, Program

pytestmark = pytest.mark.guest

SCALE = 20 if os.environ.get("HYPOTHESIS_PROFILE") == "search" else 1
SCENARIOS = 15 * SCALE
"""Of each pair of modes."""
ROUNDS = 6
"""Sets of tables in one scenario."""

RIGHTS = ("p", "rw", "us", "nx", "a", "d", "pwt", "pcd", "g")
ODD = ("ps", "pat", *(f"bit{n}" for n in (9, 11, 13, 40, 47, 51, 52, 58, 59, 62)))
"""No bit that leads elsewhere in an entry that QEMU follows although it is malformed (erratum qemu-tcg-pml4e-bit-8 and
the like): the model has none to follow it with. For the same reason G is left alone in PML4Es and PML5Es."""
GUESTS = [name for name, mode in MODES.items() if mode.paging or name == "off"]
HOSTS = ("4-level", "5-level", "PAE")
"""Not the nested tables of an L1 in 32-bit mode: QEMU does not walk those (erratum qemu-tcg-legacy-nested),
so that L2 has not even its own code."""


def _change(rng: random.Random, entry: str, wide: bool) -> Change:
    """Bits to set and to clear in an entry that grants all: mostly one."""
    names = [name for name in RIGHTS if wide or name != "nx"]
    if entry.endswith(("pml4e", "pml5e")):
        names.remove("g")
    names += [name for name in ODD if wide or not name.startswith("bit") or int(name[3:]) < 32]
    set_: list[str] = []
    clear: list[str] = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(names[:8] * 2 + names)
        (clear if name in ("p", "rw", "us") else set_).append(name)
    return Change(set=tuple(set_), clear=tuple(clear))


def _registers(rng: random.Random) -> list[Op]:
    ops: list[Op] = []
    for where, register, bit, usual in (("vmcb", "cr0", "wp", True), ("vmcb", "cr4", "smep", False),
                                        ("vmcb", "cr4", "smap", False), ("vmcb", "efer", "nxe", True),
                                        ("vmcb", "rflags", "ac", False), ("host", "cr0", "wp", True),
                                        ("host", "efer", "nxe", True)):
        if rng.random() < 0.25:
            change = Change(clear=(bit,)) if usual else Change(set=(bit,))
            ops.append(VmcbOp(register, change) if where == "vmcb" else HostOp(register, change))
    return ops


def scenarios(rng: random.Random, guest: str, nested: str, entries: dict[str, dict[str, int]]) -> Iterator[Scenario]:
    """`entries` are the entries' names by page sizes, and their values to begin with."""
    for number in range(SCENARIOS):
        guest_page = rng.choice(MODES[guest].pages)
        nested_page = rng.choice((*HOST_MODES[nested].pages, *HOST_MODES[nested].pages, NO_NESTED_PAGING))
        values = entries[f"{guest_page} {nested_page}"]
        ops = _registers(rng)
        changed: set[str] = set()
        for _ in range(ROUNDS):
            ops += [EntryOp(name, Change(value=values[name])) for name in sorted(changed)]
            changed = set(rng.sample(sorted(values), min(len(values), rng.choice([1, 1, 2, 3]))))
            wide = {"guest": MODES[guest].long or guest == "PAE", "nested": nested != "32-bit"}
            ops += [EntryOp(name, _change(rng, name, wide[name.split(".")[0]]), rng.choice(["b", "c"])
                            if name.endswith("a.pte") and rng.random() < 0.1 else None) for name in sorted(changed)]
            ops.append(VmcbOp("tlb_control", Change(value=1)))
            probes = [Probe(rng.choice(["read", "write", "rmw", "fetch"]), rng.choice("aaab"), rng.randrange(512) * 8,
                            value=None) for _ in range(rng.choice([1, 2, 3]))]
            ops.append(RunOp(tuple(probes), rng.choice([0, 3])))
        name = f"{guest} over {nested}, {guest_page} over {nested_page}, {number}"
        yield Scenario(name, name, "15.25", "", tuple(ops), guest, nested, guest_page, nested_page, name)


def _entries(compiler: Compiler, guest: str, nested: str) -> dict[str, dict[str, int]]:
    found = {}
    for guest_page in MODES[guest].pages:
        for nested_page in (*HOST_MODES[nested].pages, NO_NESTED_PAGING):
            empty = Scenario("", "", "", "", (), guest, nested, guest_page, nested_page)
            world = compiler.compile(empty).world
            wanted = {name: at for name, at in world.entries.items()
                      if name.split(".")[1] in ("a", "pt", "pd", "pdpt", "pml4", "pml5")}
            found[f"{guest_page} {nested_page}"] = {
                name: world.words[at & ~7] >> (at & 7) * 8 & (1 << 8 * world.entry_widths[name.split(".")[0]]) - 1
                for name, at in wanted.items()
            }
    return found


@pytest.mark.parametrize("nested", HOSTS)
@pytest.mark.parametrize("guest", GUESTS)
def test_random_tables(guest: str, nested: str, machine: TcgMachine, errata: list[Erratum]) -> None:
    compiler = Compiler(machine.image, machine.cpu)
    twin = Twin(machine.image, machine.cpu, tcg.LIBERTIES)
    seen: Counter[str] = Counter()

    def programs() -> Iterator[Program]:
        """Those that lead L2 to pages of its own, or to a fault: the others say nothing, and are left out."""
        rng = random.Random(f"{guest} {nested}")
        for scenario in scenarios(rng, guest, nested, _entries(compiler, guest, nested)):
            program = compiler.compile(scenario)
            try:
                rehearse(twin, program)
            except UsageError:
                seen["left out"] += 1
                continue
            yield program

    known = [e for e in errata if e.holds_for("qemu-tcg", machine.identity.qemu_version)]
    for result in Lockstep(machine, machine.channel, twin, strict=True, errata=known).run(programs()):
        assert result.lost is None and not result.senseless
        new = [d for d in result.divergences if d.erratum is None]
        if new and new[0].field == "course" and len(result.divergences) > 1:
            new = []  # an erratum led L2 where the model cannot follow
            seen["given up"] += 1
        assert new == []
        seen.update({"scenarios": 1, "VMRUNs": result.vmruns, "probes": result.probes})
    assert seen["scenarios"] - seen["given up"] > SCENARIOS // 3 and seen["VMRUNs"] > 2 * SCENARIOS, seen
    print(dict(seen))
