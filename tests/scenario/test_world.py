"""The world that scenarios start in: for every size of pages and of physical addresses."""

from __future__ import annotations

from itertools import product

import pytest

from harness.lockstep.twin import Twin
from harness.model import vmrun
from harness.model.access import Access, Reached
from harness.model.consistency import violations
from harness.model.entries import FRAME, NX, PS, RW, US, A, D, P
from harness.model.liberties import Liberties
from harness.model.registers import Cpu
from harness.model.vmcb import FIELDS, NP_ENABLE, Vmcb
from harness.model.walk import FINAL, GUEST, Walk, translate
from harness.scenario.modes import HOST_MODES, MODES
from harness.scenario.ops import NO_NESTED_PAGING
from harness.scenario.world import PAGES, World, build
from harness.wire.image import Image, tag

LEVELS = {"4K": ("pml4e", "pdpte", "pde", "pte"), "2M": ("pml4e", "pdpte", "pde"), "1G": ("pml4e", "pdpte")}
TABLES = ("pml4", "pdpt", "pd", "pt")
SIZES = list(product(LEVELS, LEVELS))
ACCESSES = [Access(w, f, u) for u in (False, True) for w, f in ((False, False), (True, False), (False, True))]


class Case:
    def __init__(self, image: Image, sizes: tuple[str, str], maxphyaddr: int) -> None:
        self.image = image
        self.guest, self.nested = sizes
        self.cpu = Cpu(maxphyaddr, features=frozenset({"nx"}))
        self.world = build(image, self.cpu, guest_page=sizes[0], nested_page=sizes[1])
        self.twin = Twin(image, self.cpu, Liberties())
        self.twin.reset(self.world)
        vmcb = self.twin.vmcb
        assert list(violations(vmcb, self.twin.host, self.cpu, self.twin.memory.words)) == []
        self.paging = vmrun.paging(vmrun.load(vmcb, self.twin.host), vmcb, self.twin.host, self.cpu)

    def walk(self, gva: int, access: Access = ACCESSES[0]) -> Walk:
        return translate(self.paging, self.twin.memory.words, gva, access)


ALL = [(*sizes, bits) for sizes in SIZES for bits in (36, 40, 52)]
ALL += [(guest, NO_NESTED_PAGING, 40) for guest in LEVELS]


@pytest.fixture(scope="module", params=ALL, ids=lambda p: "-".join(map(str, p)))
def case(request: pytest.FixtureRequest, image: Image) -> Case:
    guest, nested, bits = request.param
    return Case(image, (guest, nested), bits)


@pytest.fixture
def world(case: Case) -> World:
    return case.world


def _is_nested(case: Case) -> bool:
    return case.nested != NO_NESTED_PAGING


def test_pages_are_where_the_world_says(case: Case, world: World) -> None:
    for page in PAGES:
        for access in ACCESSES:
            for offset in (0, 8, 0xFF8):
                outcome = case.walk(world.gva[page] + offset, access).outcome
                assert outcome == Reached(world.spa[page] + offset, world.gpa[page] + offset)
        assert world.spa[page] in case.image.data
        assert case.twin.memory.words[world.spa[page] >> 3] == tag(world.spa[page])


def test_every_table_is_translated(case: Case, world: World) -> None:
    """Each guest table by a nested walk of its own leaf, whose sPA is the world's."""
    walk = case.walk(world.gva["a"])
    guest = [s for s in walk.steps if s.dimension == GUEST]
    assert [s.address & ~0xFFF for s in guest] == [world.spa[t] for t in TABLES[: len(guest)]]
    assert world.vmcb["cr3"] == world.gpa["pml4"]
    for above, table in zip(guest, TABLES[1 : len(guest)], strict=False):
        assert above.entry & FRAME == world.gpa[table]
    if _is_nested(case):
        for step, table in zip(guest, TABLES, strict=False):
            leaf = next(s for s in walk.steps if s.purpose == step.level and s.level == "pte")
            assert leaf.address == world.entries[f"nested.{table}.pte"]
            assert world.gpa[table] != world.spa[table]
        assert world.vmcb["np_control"] == NP_ENABLE
    else:
        assert world.vmcb["np_control"] == 0 and not any(s.dimension != GUEST for s in walk.steps)


def test_names_are_those_of_the_walk(case: Case, world: World) -> None:
    """Every entry of every page's walk has its name, at the address where the walk reads it."""
    for page in PAGES:
        steps = case.walk(world.gva[page]).steps
        guest = {s.level: s.address for s in steps if s.dimension == GUEST}
        final = {s.level: s.address for s in steps if s.purpose == FINAL}
        assert guest == {level: world.entries[f"guest.{page}.{level}"] for level in LEVELS[case.guest]}
        if _is_nested(case):
            assert final == {level: world.entries[f"nested.{page}.{level}"] for level in LEVELS[case.nested]}
    expected = {f"guest.{page}.{level}" for page in PAGES for level in LEVELS[case.guest]}
    if _is_nested(case):
        expected |= {f"nested.{page}.{level}" for page in PAGES for level in LEVELS[case.nested]}
        expected |= {f"nested.{table}.{level}" for table in (*TABLES, "code", "mailbox") for level in LEVELS["4K"]}
    assert expected <= world.entries.keys()
    assert not [n for n in world.entries if n not in expected and n.split(".")[1] in (*PAGES, *TABLES)]


def test_what_can_fault_alone(case: Case, world: World) -> None:
    """Each page has leaves of its own where they are 4K; each table of L2 has a nested walk of its
    own below the root, so that it alone can be made to fault."""
    if case.guest == "4K":
        assert len({world.entries[f"guest.{p}.pte"] for p in PAGES}) == 4
    if case.nested == "4K":
        assert len({world.entries[f"nested.{p}.pte"] for p in PAGES}) == 4
    if _is_nested(case):
        for level in ("pdpte", "pde", "pte"):
            tables = {world.entries[f"nested.{t}.{level}"] for t in TABLES}
            others = {world.entries.get(f"nested.{p}.{level}") for p in (*PAGES, "code", "mailbox")}
            assert len(tables) == 4 and not tables & others
        if case.cpu.maxphyaddr >= 40:
            assert world.entries["nested.a.pml4e"] != world.entries["nested.pt.pml4e"]


def test_entries_under_test_are_pristine(case: Case, world: World) -> None:
    """All rights, no A, no D, no NX: whatever a scenario sees there, it did."""
    words = case.twin.memory.words
    for name, at in world.entries.items():
        if name.split(".")[1] in PAGES or (name.split(".")[1] in TABLES and not name.endswith("pml4e")):
            entry = words[at >> 3]
            assert entry & (P | RW | US) == P | RW | US and not entry & (NX | D), name
            if case.cpu.maxphyaddr >= 40 or not name.endswith("pml4e"):
                # (with a small address width all of the nested dimension is under one root entry)
                assert not entry & A or (name == "nested.pml4.pdpte"), name
            if name.split(".")[1] in PAGES:
                size = case.guest if name.startswith("guest") else case.nested
                assert bool(entry & PS) == (name.split(".")[2] == LEVELS[size][-1] != "pte"), name


def test_l2_has_its_own_pages(case: Case, world: World) -> None:
    for user in (False, True):
        fetch = Access(fetch=True, user=user)
        assert case.walk(world.code[user], fetch).outcome == Reached(case.image.stubs["long"].page, world.gpa["code"])
        for write in (False, True):
            outcome = case.walk(world.mailbox[user], Access(write=write, user=user)).outcome
            assert outcome == Reached(case.image.mailbox, world.gpa["mailbox"])
    # they do not disturb what is under test: their walks set nothing there
    tested = {at for name, at in world.entries.items() if name.split(".")[1] in PAGES}
    for gva, access in ((world.code[0], Access(fetch=True)), (world.mailbox[1], Access(write=True, user=True))):
        for address, bits, _ in case.walk(gva, access).updates:
            if address in tested:
                assert case.cpu.maxphyaddr < 40 or bits == A
            elif address & ~4095 != world.spa["pml4"]:
                assert case.twin.memory.words[address >> 3] & bits == bits or address in world.entries.values()


def test_l2_reaches_its_own_tables(case: Case, world: World) -> None:
    named = {n for n in world.entries if n.startswith("guest.") and n.split(".")[1] in PAGES}
    assert named <= world.entry_gva.keys()
    for name, gva in world.entry_gva.items():
        outcome = case.walk(gva, Access(write=True)).outcome
        assert isinstance(outcome, Reached) and outcome.spa == world.entries[name]


def test_pages_are_scattered(case: Case, world: World) -> None:
    """A value read says which page it is: no two are the same, and neither dimension is linear."""
    assert len({world.spa[p] for p in PAGES}) == 4 and len({world.gpa[p] for p in PAGES}) == 4
    gva = [world.gva[p] for p in PAGES]
    assert gva == list(range(gva[0], gva[0] + 0x4000, 0x1000))
    for page in PAGES:
        assert len({world.gva[page] & FRAME, world.gpa[page], world.spa[page]}) == (3 if _is_nested(case) else 2)
    if case.guest == "4K":
        assert [world.gpa[p] - world.gpa["a"] for p in PAGES] != [0, 0x1000, 0x2000, 0x3000]


def test_it_stays_in_its_memory(case: Case, world: World) -> None:
    arena = case.image.arena
    for address in world.words:
        assert address in arena and (address < arena.start + world.arena_used or address & ~0xFFF == world.system)
    assert set(range(arena.start, arena.start + world.arena_used, 4096)) <= set(world.watch)
    assert {world.spa[p] for p in PAGES} <= set(world.watch) and len(set(world.watch)) == len(world.watch)
    limit = 1 << case.cpu.maxphyaddr
    for address, entry in world.words.items():
        if address & ~0xFFF != world.system:
            assert entry & P and entry & FRAME < limit


def test_the_vmcb(case: Case, world: World) -> None:
    block = Vmcb(case.twin.memory, world.vmcb_address)
    assert {name: block[name] for name in world.vmcb} == world.vmcb
    assert world.vmcb_address == case.image.vmcbs.start
    assert set(world.vmcb) <= FIELDS.keys()
    # what is free to choose is unlike anything else, so that a field that is mixed up shows
    values = [v for n, v in world.vmcb.items() if v >> 32 and n not in ("g_pat", "star")]
    assert len(set(values)) == len(values)


def test_the_same_again(image: Image) -> None:
    """No randomness: a verdict can be reproduced."""
    assert build(image, Cpu(40), guest_page="2M") == build(image, Cpu(40), guest_page="2M")


@pytest.mark.parametrize(("mode", "high"), [("4-level", 63), ("5-level", 63), ("PAE", 31), ("32-bit", 31)])
def test_a_gate_that_loses_a_bit_leads_elsewhere(mode: str, high: int, image: Image) -> None:
    """Nearly all bits above the offset in the page are set in the addresses of L2's handlers, those of each half of a
    gate's offset at its ends among them."""
    code = build(image, Cpu(40, features=frozenset({"la57"})), mode).code[0]
    clear = [bit for bit in range(12, high + 1) if not code >> bit & 1]
    assert len(clear) <= 4 and not {12, 15, 16, 31, 32, 63} & set(clear)


MODE_SIZES = [(name, host, guest, nested) for name, mode in MODES.items() for guest in mode.pages
              for host, l1 in HOST_MODES.items() for nested in (*l1.pages, NO_NESTED_PAGING)
              if host != "off" or nested == NO_NESTED_PAGING]  # 15.25.3


@pytest.mark.parametrize(("mode", "host_mode", "guest", "nested"), MODE_SIZES, ids="-".join)
@pytest.mark.parametrize("bits", [36, 40, 52])
def test_every_mode(mode: str, host_mode: str, guest: str, nested: str, bits: int, image: Image) -> None:
    """Each mode of L1 with each of L2 under each size of pages: VMRUN is legal, pages are where the world
    says, each has its names, and nothing under test has A or D yet."""
    cpu = Cpu(bits, features=frozenset({"la57", "page1g", "nx"}))
    world = build(image, cpu, mode, host_mode, guest, nested)
    twin = Twin(image, cpu, Liberties())
    twin.reset(world)
    host = twin.host_at_vmrun()
    assert list(violations(twin.vmcb, host, cpu, twin.memory.words)) == []
    paging = vmrun.paging(vmrun.load(twin.vmcb, host), twin.vmcb, host, cpu)
    width = {"guest": 4 if mode == "32-bit" else 8, "nested": 4 if host_mode == "32-bit" else 8}
    entries: dict[str, int] = {}
    for page in PAGES:
        walk = translate(paging, twin.memory.words, world.gva[page] + 8, Access(write=True, user=True))
        assert walk.outcome == Reached(world.spa[page] + 8, world.gpa[page] + 8)
        for step in walk.steps:
            if step.dimension == GUEST:
                entries[f"guest.{page}.{step.level}"] = step.address
            elif step.purpose == FINAL:
                entries[f"nested.{page}.{step.level}"] = step.address
    assert entries.items() <= world.entries.items()
    assert {n for n in world.entries if n.split(".")[1] in PAGES} == entries.keys()
    assert world.entry_widths["guest"] == width["guest"] or mode in ("off", "real")
    for name, at in entries.items():
        entry = twin.memory.read(at, width[name.split(".")[0]])
        assert entry & P, name
        assert not entry & D, name
        wide = bits >= 40 and MODES[mode].long and not HOST_MODES[host_mode].narrow
        assert not entry & A or not wide, name
    base = world.vmcb["cs.base"]
    code = translate(paging, twin.memory.words, world.code[1] + base, Access(fetch=True, user=True)).outcome
    assert isinstance(code, Reached) and code.spa == image.stubs[world.mode.stub].page
    mailbox = translate(paging, twin.memory.words, world.mailbox[1], Access(write=True, user=True)).outcome
    assert isinstance(mailbox, Reached) and mailbox.spa == image.mailbox
    assert len({world.gva[p] for p in PAGES}) == len({world.spa[p] for p in PAGES}) == 4


@pytest.mark.parametrize(
    ("guest", "nested", "size", "level"),
    [(guest, nested, size, level)
     for guest in ("4-level", "5-level", "PAE", "32-bit")
     for nested, size, level in (("4-level", "2M", "pde"), ("5-level", "1G", "pdpte"), ("PAE", "2M", "pde"),
                                 ("32-bit", "4M", "pde"))],
)
def test_tables_in_large_nested_pages(guest: str, nested: str, size: str, level: str, image: Image) -> None:
    """Each table of L2 is where its large page has it, and a walk comes to its page."""
    cpu = Cpu(40, features=frozenset({"nx", "la57"}))
    world = build(image, cpu, guest, nested, table_page=size)
    twin = Twin(image, cpu, Liberties())
    twin.reset(world)
    paging = twin.paging(vmrun.load(twin.vmcb, twin.host))
    walk = translate(paging, twin.memory.words, world.gva["a"], Access())
    assert walk.outcome == Reached(world.spa["a"], world.gpa["a"])
    tables = {step.purpose: step for step in walk.steps if step.purpose not in ("", FINAL)}
    assert tables and all(step.level == level and step.entry & PS for step in tables.values())
    assert world.entries[f"nested.pt.{level}"] == tables["pte"].address


@pytest.mark.parametrize(("guest", "page"), [("4-level", "4K"), ("PAE", "4K"), ("PAE", "2M"), ("32-bit", "4M")])
def test_pages_lie_behind_another_entry_of_the_nested_root(guest: str, page: str, image: Image) -> None:
    """So that what is changed of one is not what the walk for L2's tables meets first."""
    entries = build(image, Cpu(40, features=frozenset({"nx"})), guest, guest_page=page).entries
    assert entries["nested.a.pml4e"] != entries["nested.pd.pml4e"]


@pytest.mark.parametrize(("guest", "host", "nested", "tables", "pages"), [
    ("4-level", "4-level", "4K", True, True), ("5-level", "5-level", "1G", True, True),
    ("32-bit", "4-level", "4K", True, True), ("real", "4-level", "4K", True, True),
    ("4-level", "PAE", "2M", False, True), ("4-level", "32-bit", "4K", False, False),
    ("4-level", "4-level", NO_NESTED_PAGING, True, True), ("PAE", "4-level", NO_NESTED_PAGING, False, True),
    ("32-bit", "4-level", NO_NESTED_PAGING, False, False), ("off", "4-level", NO_NESTED_PAGING, False, False),
    ("4-level", "off", NO_NESTED_PAGING, True, True),
])
def test_above_4_gib_where_it_may_be(
    guest: str, host: str, nested: str, tables: bool, pages: bool, image: Image
) -> None:
    """An address that is cut to 32 bits leads elsewhere: tables of both dimensions and pages lie above 4 GiB."""
    world = build(image, Cpu(40, features=frozenset({"nx", "la57", "page1g"})), guest, host, "4K", nested)
    assert {at >> 32 > 0 for at in world.words if at & ~0xFFF not in (image.mailbox,)} == {tables}
    assert {world.spa[page] >> 32 > 0 for page in PAGES} == {pages}
    assert world.vmcb_address >> 32 == (not HOST_MODES[host].narrow)
    assert tuple(world.arena) == tuple(image.arena if tables else image.low_arena)
