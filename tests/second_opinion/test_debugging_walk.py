"""QEMU's debugging walk (`gva2gpa`, x86_cpu_get_phys_page_attrs_debug) and its `info mem`, over random tables.

Both are code of their own, apart from the emulated MMU. They judge, in all five formats, which entries
a walk reads, where it ends, what P=0 and a gVA that is not canonical come to, and which rights all levels
leave. They know no reserved bits, no NX and no second dimension: for those see test_real_walks.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from harness.model.access import Access, Outcome, Reached
from harness.model.entries import Format, legacy, long_mode, pae
from harness.model.registers import CR4, EFER
from harness.model.walk import translate
from tests.model.tables import Space
from tests.second_opinion.debugger import RAM, TABLES, Debugger

pytestmark = pytest.mark.guest

SCALE = 20 if os.environ.get("HYPOTHESIS_PROFILE") == "search" else 1
TABLES_OF_A_MODE = 250 * SCALE
ROUNDS_OF_RIGHTS = 50 * SCALE
ONE_DIMENSION = Space(nested=False).paging(wp=True)


@dataclass(frozen=True)
class Mode:
    """Registers, and the shape of the tables: written down here, not taken from the model."""

    fmt: Format
    cr4: int
    efer: int
    shifts: tuple[int, ...]
    large: frozenset[int]
    entry_bytes: int = 8


LONG = EFER.LME | EFER.NXE
MODES = {
    "4-level": Mode(long_mode(52, True), CR4.PAE, LONG, (39, 30, 21, 12), frozenset({30, 21})),
    "5-level": Mode(long_mode(52, True, la57=True), CR4.PAE | CR4.LA57, LONG, (48, 39, 30, 21, 12),
                    frozenset({30, 21})),
    "PAE": Mode(pae(52, True), CR4.PAE, EFER.NXE, (30, 21, 12), frozenset({21})),
    "32-bit": Mode(legacy(40, True), CR4.PSE, 0, (22, 12), frozenset({22}), 4),
    "32-bit without PSE": Mode(legacy(40, False), 0, 0, (22, 12), frozenset(), 4),
}


@dataclass
class Tables:
    """Random tables that form a tree, in quadwords `words` by index; `gvas` lead to entries that were
    written, and beside them. `flaws` allows P=0, missing rights and bits without a meaning there."""

    mode: Mode
    rng: random.Random
    words: dict[int, int] = field(default_factory=dict)
    gvas: list[int] = field(default_factory=list)
    next: int = TABLES + 0x1000

    def make(self) -> int:
        """Returns CR3."""
        low = self.rng.choice([0, 0x20, 0xFE0]) if len(self.mode.shifts) == 3 else 0
        self._table(TABLES + low, 0, 0)
        return TABLES + low

    def _table(self, address: int, depth: int, gva: int) -> None:
        rng, shifts = self.rng, self.mode.shifts
        shift = shifts[depth]
        entries = 4 if shifts[0] == 30 and depth == 0 else 4096 // self.mode.entry_bytes
        for _ in range(rng.choice([1, 2, 3])):
            index = rng.randrange(entries)
            below = gva | index << shift
            at = address + index * self.mode.entry_bytes
            if self.words.get(at >> 3):
                continue  # one entry for each quadword keeps the tables a tree
            large = shift in self.mode.large and rng.random() < 0.3
            leaf = shift == 12 or large
            if leaf or self.next >= RAM:
                frame = rng.getrandbits(40 if self.mode.entry_bytes == 8 else 32) & ~0xFFF
            else:
                frame, self.next = self.next, self.next + 0x1000
                self._table(frame, depth + 1, below)
            self._set(at, frame | self._flags(depth, leaf, large, shift))
            self.gvas.append(below | rng.getrandbits(shift))

    def _flags(self, depth: int, leaf: bool, large: bool, shift: int) -> int:
        rng = self.rng
        flags = int(rng.random() < 0.9)  # P
        if not (len(self.mode.shifts) == 3 and depth == 0):
            flags |= (rng.random() < 0.7) << 1 | (rng.random() < 0.7) << 2 | rng.getrandbits(4) << 3
            flags |= rng.getrandbits(1) << 63 if self.mode.entry_bytes == 8 else 0
        if large:
            flags |= 1 << 7
        elif leaf or (self.mode.entry_bytes == 4 and not self.mode.large):
            flags |= rng.getrandbits(1) << 7  # PAT, or PS without CR4.PSE: neither has a say
        return flags | rng.getrandbits(3) << 9

    def _set(self, at: int, entry: int) -> None:
        self.words[at >> 3] = self.words.get(at >> 3, 0) | entry << (at & 4) * 8


def _without_reserved(fmt: Format) -> Format:
    return fmt._replace(levels=tuple(level._replace(reserved_table=0, reserved_leaf=0) for level in fmt.levels))


def _outcome(mode: Mode, words: memoryview, cr3: int, gva: int, access: Access) -> Outcome | None:
    """None if the walk leaves memory, as a wrong one may."""
    paging = ONE_DIMENSION._replace(guest=_without_reserved(mode.fmt), gcr3=cr3)
    try:
        return translate(paging, words, gva, access).outcome
    except IndexError:
        return None


@pytest.fixture(scope="module")
def debugger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debugger]:
    folder: Path = tmp_path_factory.mktemp("debugger")
    with Debugger(folder) as machine:
        yield machine


def _rounds(debugger: Debugger, mode: Mode, count: int, seed: str) -> Iterator[tuple[Tables, int]]:
    """Tables in the machine's memory, `count` times, the CPU walking them."""
    rng = random.Random(seed)
    for number in range(count):
        tables = Tables(mode, rng)
        cr3 = tables.make()
        for index, word in tables.words.items():
            debugger.words[index] = word
        if not number or len(mode.shifts) == 3:
            debugger.enter(mode.cr4, mode.efer, cr3)
        yield tables, cr3
        for index in tables.words:
            debugger.words[index] = 0


def _canonical(gva: int, bits: int) -> int:
    return gva | -(gva >> bits - 1 & 1) << bits & (1 << 64) - 1


def _different_addresses(debugger: Debugger, mode: Mode, count: int, seed: str) -> tuple[list[str], Counter[str]]:
    """What the two do not agree on, and how many walks ended how."""
    bits = mode.shifts[0] + (10 if mode.entry_bytes == 4 else 2 if mode.shifts[0] == 30 else 9)
    found, ends = [], Counter[str]()
    for number, (tables, cr3) in enumerate(_rounds(debugger, mode, count, seed)):
        gvas = [_canonical(gva, bits) if bits > 32 else gva for gva in tables.gvas[:8]]
        gvas += [gva ^ 1 << tables.rng.randrange(12, min(bits + 4, 64) if bits > 32 else 32) for gva in gvas[:2]]
        for gva, theirs in zip(gvas, debugger.physical(gvas), strict=True):
            ours = _outcome(mode, debugger.words, cr3, gva, Access())
            ends[type(ours).__name__] += 1
            if ours is None or theirs != (ours.spa if isinstance(ours, Reached) else None):
                found.append(f"tables {number}: gVA {gva:#x} is {theirs and hex(theirs)}, ours {ours}")
    return found, ends


def _different_rights(debugger: Debugger, mode: Mode, count: int, seed: str) -> tuple[list[str], set[str]]:
    """What the two do not agree on, and which rights there were."""
    bits = 48 if mode.shifts[0] == 39 else 32
    found, seen = [], set()
    for number, (tables, cr3) in enumerate(_rounds(debugger, mode, count, seed)):
        ranges = debugger.ranges()
        for gva in tables.gvas:
            gva = _canonical(gva, bits) if bits > 32 else gva
            ours = "".join(
                letter if isinstance(_outcome(mode, debugger.words, cr3, gva, access), Reached) else "-"
                for letter, access in (("u", Access(user=True)), ("r", Access()), ("w", Access(write=True)))
            )
            theirs = next((rights for first, last, rights in ranges if first <= gva < (last or 1 << 64)), "---")
            seen.add(ours)
            if theirs != ours:
                found.append(f"tables {number}: gVA {gva:#x} is {theirs}, ours {ours}")
    return found, seen


@pytest.mark.parametrize("name", MODES)
def test_addresses(name: str, debugger: Debugger) -> None:
    found, ends = _different_addresses(debugger, MODES[name], TABLES_OF_A_MODE, f"addresses {name}")
    assert found == []
    assert ends["Reached"] > TABLES_OF_A_MODE and ends["PageFault"] > TABLES_OF_A_MODE, ends
    assert bool(ends["GeneralProtection"]) == (MODES[name].shifts[0] > 30), ends


@pytest.mark.parametrize("name", [name for name in MODES if name != "5-level"])
def test_rights_of_all_levels(name: str, debugger: Debugger) -> None:
    """`info mem` prints ranges with the AND over all levels of U/S and of R/W (table 5-2). Not with five
    levels: there (mem_info_la57) it takes the PDPTEs that are present for those that are not."""
    found, seen = _different_rights(debugger, MODES[name], ROUNDS_OF_RIGHTS, f"rights {name}")
    assert found == []
    assert seen == {"---", "-r-", "-rw", "ur-", "urw"}


def _level(fmt: Format, name: str, **changes: int) -> Format:
    return fmt._replace(levels=tuple(
        level._replace(**changes) if level.name == name else level for level in fmt.levels))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "fmt"), [
    ("4-level", _level(MODES["4-level"].fmt, "pdpte", leaf=0)),
    ("4-level", MODES["4-level"].fmt._replace(address_bits=47)),
    ("5-level", _level(MODES["5-level"].fmt, "pml5e", down=46)),
    ("PAE", MODES["PAE"].fmt._replace(root_mask=0xFFFF_F000)),
    ("32-bit", MODES["32-bit without PSE"].fmt),
    ("32-bit without PSE", MODES["32-bit"].fmt),
])
def test_a_wrong_address_is_found(name: str, fmt: Format, debugger: Debugger) -> None:
    found, _ = _different_addresses(debugger, replace(MODES[name], fmt=fmt), 30, "planted")
    assert found


@pytest.mark.parametrize("granted", [2, 4], ids=["R/W", "U/S"])
def test_a_wrong_right_is_found(granted: int, debugger: Debugger) -> None:
    fmt = _level(MODES["4-level"].fmt, "pde", granted=granted)
    found, _ = _different_rights(debugger, replace(MODES["4-level"], fmt=fmt), 10, "planted")
    assert found
