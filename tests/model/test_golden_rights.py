"""The manual's tables of rights, row by row: 5-2 and 5-3 (guest), 15.25.7 (nested), 15-21 (GMET), 5.6.7 (keys).

Every combination of the bits that a table has columns for is walked, and the row that it falls in says what
must come of it.
"""

from __future__ import annotations

from itertools import product

import pytest

from harness.model.access import Access
from tests.model.golden import Case

GVA, PAGE = 0x7F12_3456_7ABC, 0x9000
AT = (0x1000 + 0xFE * 8, 0x2000 + 0x48 * 8, 0x3000 + 0x1A2 * 8, 0x4000 + 0x167 * 8)
TABLES = (0x2000, 0x3000, 0x4000, PAGE)

# Table 5-2: U/S and R/W of PML4E, PDPE, PDE, PTE ("-" is don't care), then U/S and R/W of the page.
TABLE_5_2 = (
    ("S- -- -- --", "S RW"),
    ("-- S- -- --", "S RW"),
    ("-- -- S- --", "S RW"),
    ("-- -- -- S-", "S RW"),
    ("UR U- U- U-", "U R1"),  # 1: supervisors can write
    ("U- UR U- U-", "U R1"),
    ("U- U- UR U-", "U R1"),
    ("U- U- U- UR", "U R1"),
    ("UW UW UW UW", "U RW"),
)
# Table 5-3: R/W of the four levels, then of the page, for supervisors while CR0.WP=1.
TABLE_5_3 = (("W W W W", "W"), ("R - - -", "R"), ("- R - -", "R"), ("- - R -", "R"), ("- - - R", "R"))


def _matches(row: str, bits: str) -> bool:
    return all(wanted in ("-", " ", got) for wanted, got in zip(row, bits, strict=True))


def _row(table: tuple[tuple[str, str], ...], bits: str) -> str:
    found = {result for row, result in table if _matches(row, bits)}
    assert len(found) == 1, (bits, found)
    return found.pop()


def _case(levels: tuple[tuple[str, str], ...], wp: bool, nested: bool = False) -> Case:
    case = Case(cr0=0x8001_0001 if wp else 0x8000_0001, cr3=0x1000)
    if nested:
        case = Case(cr0=1, cr4=0, efer=0x1000, np_control=1, ncr3=0x1000, host_cr0=0x8001_0001 if wp else 0x8000_0001)
    for at, below, (us, rw) in zip(AT, TABLES, levels, strict=True):
        case.put(at, below | 1 | (4 if us == "U" else 0) | (2 if rw == "W" else 0))
    return case


COMBINATIONS = list(product(product("US", "RW"), repeat=4))


@pytest.mark.parametrize("wp", [False, True])
def test_tables_5_2_and_5_3(wp: bool) -> None:
    """All 256 combinations. With CR0.WP=1 supervisors obey R/W as table 5-3 has it, users as before (5.8.1)."""
    for levels in COMBINATIONS:
        user, writable = _row(TABLE_5_2, " ".join(us + rw for us, rw in levels)).split()
        supervisors_write = _row(TABLE_5_3, " ".join(rw for _, rw in levels)) == "W" if wp else True
        case = _case(levels, wp)
        ok = ("sPA", PAGE | 0xABC)
        assert case.outcome(GVA, "read") == ok and case.outcome(GVA, "fetch") == ok
        assert case.outcome(GVA, "write") == (ok if supervisors_write else ("#PF", 0x3)), levels
        assert case.outcome(GVA, "user read") == (ok if user == "U" else ("#PF", 0x5)), levels
        assert case.outcome(GVA, "user fetch") == (ok if user == "U" else ("#PF", 0x15)), levels
        assert case.outcome(GVA, "user write") == (ok if (user, writable) == ("U", "RW") else ("#PF", 0x7)), levels


@pytest.mark.parametrize("wp", [False, True])
def test_nested_levels(wp: bool) -> None:
    """15.25.7: all must be user for any access, all writable for a write; hCR0.WP is ignored, and the CPL too."""
    for levels in COMBINATIONS:
        case = _case(levels, wp, nested=True)
        user, writable = all(us == "U" for us, _ in levels), all(rw == "W" for _, rw in levels)
        ok = ("sPA", PAGE | 0xABC)
        for who in ("", "user "):
            assert case.outcome(GVA, who + "read") == (ok if user else ("#NPF", 0x1_0000_0005, GVA)), levels
            assert case.outcome(GVA, who + "fetch") == (ok if user else ("#NPF", 0x1_0000_0015, GVA)), levels
            assert case.outcome(GVA, who + "write") == (
                ok if user and writable else ("#NPF", 0x1_0000_0007, GVA)), levels


@pytest.mark.parametrize("nested", [False, True])
def test_no_execute_of_any_level(nested: bool) -> None:
    """5.6.3, 15.25.7: one NX on the way is enough, for any CPL."""
    for marks in product((0, 1), repeat=4):
        case = _case((("U", "W"),) * 4, True, nested)
        for at, mark in zip(AT, marks, strict=True):
            case.put(at, case.get(at) | mark << 63)
        denied = ("#NPF", 0x1_0000_0015, GVA) if nested else ("#PF", 0x11)
        assert case.outcome(GVA, "fetch") == (denied if any(marks) else ("sPA", PAGE | 0xABC))
        assert case.outcome(GVA, "user write") == ("sPA", PAGE | 0xABC)


# Sections 5.6.5 and 5.6.6: CR4.SMEP, CR4.SMAP, RFLAGS.AC, access; of a user page. All else is permitted.
SMEP, SMAP, AC = 1 << 20, 1 << 21, 1 << 18
DENIED_TO_SUPERVISORS = {
    (SMEP, 0, "fetch"): 0x11, (SMEP, AC, "fetch"): 0x11,
    (SMAP, 0, "read"): 0x1, (SMAP, 0, "write"): 0x3,
    (SMEP | SMAP, 0, "read"): 0x1, (SMEP | SMAP, 0, "write"): 0x3,
    (SMEP | SMAP, 0, "fetch"): 0x11, (SMEP | SMAP, AC, "fetch"): 0x11,
}


@pytest.mark.parametrize("cr4", [0, SMEP, SMAP, SMEP | SMAP])
@pytest.mark.parametrize("ac", [0, AC])
def test_smep_and_smap(cr4: int, ac: int) -> None:
    for us in "US":
        case = _case((("U", "W"), ("U", "W"), (us, "W"), ("U", "W")), True).but(cr4=0x20 | cr4, rflags=2 | ac)
        for access in ("read", "write", "fetch"):
            code = DENIED_TO_SUPERVISORS.get((cr4, ac, access)) if us == "U" else None
            assert case.outcome(GVA, access) == (("#PF", code) if code else ("sPA", PAGE | 0xABC))
            user = {"read": 0x5, "write": 0x7, "fetch": 0x15}[access]
            assert case.outcome(GVA, f"user {access}") == (("#PF", user) if us == "S" else ("sPA", PAGE | 0xABC))


@pytest.mark.parametrize("cr4", [SMEP, SMAP, SMEP | SMAP])
def test_smep_and_smap_of_l1_mean_nothing_to_the_nested_dimension(cr4: int) -> None:
    """15.25.7: its pages are all user pages to whoever accesses them."""
    case = _case((("U", "W"),) * 4, True, nested=True).but(host_cr4=0x20 | cr4)
    for access in ("read", "write", "fetch", "user read", "user write", "user fetch"):
        assert case.outcome(GVA, access) == ("sPA", PAGE | 0xABC)


# Section 5.6.7, by AD and WD of the page's key, CR0.WP: what is denied, of a user page
KEYS = {
    (0, 0, 0): set[str](), (0, 0, 1): set[str](),
    (0, 1, 0): {"user write"}, (0, 1, 1): {"user write", "write"},
    (1, 0, 0): {"user read", "user write", "read", "write"}, (1, 0, 1): {"user read", "user write", "read", "write"},
    (1, 1, 0): {"user read", "user write", "read", "write"}, (1, 1, 1): {"user read", "user write", "read", "write"},
}
CODES = {"read": 0x21, "write": 0x23, "user read": 0x25, "user write": 0x27}


@pytest.mark.parametrize("key", range(16))
def test_protection_keys(key: int) -> None:
    """Figure 5-35: AD is bit 2i of PKRU, WD bit 2i+1; the key is in bits 62:59 of the last entry."""
    for (ad, wd, wp), denied in KEYS.items():
        pkru = ad << 2 * key | wd << 2 * key + 1
        for us, cr4, efer in (("U", 1 << 22, 0x1D00), ("S", 1 << 22, 0x1D00), ("U", 0, 0x1D00)):
            case = _case((("U", "W"),) * 3 + ((us, "W"),), bool(wp)).but(pkru=pkru, cr4=0x20 | cr4, efer=efer)
            case.put(AT[3], case.get(AT[3]) | key << 59)
            for access in ("read", "write", "fetch", *(("user read", "user write", "user fetch") if us == "U" else ())):
                bad = access in denied and us == "U" and cr4
                assert case.outcome(GVA, access) == (("#PF", CODES[access]) if bad else ("sPA", PAGE | 0xABC))
            case.put(AT[3], case.get(AT[3]) ^ 1 << 59)  # another key
            assert case.outcome(GVA, "write") == ("sPA", PAGE | 0xABC)


# Table 15-21: NX and U/S of the nested page, then whether user and supervisor code is executed
TABLE_15_21 = (((1, 0), False, False), ((1, 1), False, False), ((0, 1), True, False), ((0, 0), True, True))


@pytest.mark.parametrize("level", range(4))
def test_guest_mode_execute_trap(level: int) -> None:
    """One entry decides over the effective bits, at whatever level: U/S=0 and NX=1 there are enough."""
    for (nx, us), user, supervisor in TABLE_15_21:
        case = _case((("U", "W"),) * 4, True, nested=True)
        case.put(AT[level], case.get(AT[level]) & ~4 | us << 2 | nx << 63)
        on = case.but(np_control=1 | 1 << 3, features=frozenset({"gmet"}))
        for access, executed in (("user fetch", user), ("fetch", supervisor)):
            outcome = on.outcome(GVA, access)
            assert (outcome == ("sPA", PAGE | 0xABC)) == executed
            assert executed or (outcome[0] == "#NPF" and outcome[1] & 0x1_0000_0011 == 0x1_0000_0011)
        for access in ("read", "write", "user read", "user write"):
            assert on.outcome(GVA, access) == ("sPA", PAGE | 0xABC)
        # 15.25.13: on processors without it the bit is ignored
        off = case.but(np_control=1 | 1 << 3)
        assert (off.outcome(GVA, "read") == ("sPA", PAGE | 0xABC)) == bool(us)


# Section 15.25.14: R/W of the nested entries above, then NX, U/S and R/W of the last one, and whether that designates
# a supervisor shadow stack page; bit 37 of EXITINFO1 looks at the last entry alone (15.25.6)
SSS_PAGES = {
    (1, 1, 0, 0): True, (1, 1, 0, 1): True,
    (1, 1, 1, 0): False, (1, 1, 1, 1): False, (1, 0, 0, 0): False, (1, 0, 0, 1): False, (1, 0, 1, 1): False,
    (0, 1, 0, 0): False, (0, 1, 0, 1): False,
}
SHADOW_READ, SHADOW_WRITE = Access(shadow_stack=True), Access(write=True, shadow_stack=True)


def _sss(bits: tuple[int, int, int, int], **registers: int) -> Case:
    above, nx, us, rw = bits
    case = _case((("U", "W"),) * 4, True, nested=True)
    case.put(AT[1], case.get(AT[1]) & ~2 | above << 1)
    case.put(AT[3], case.get(AT[3]) & ~6 | us << 2 | rw << 1 | nx << 63)
    return case.but(features=frozenset({"sss"}), **{"np_control": 1 | 1 << 4} | registers)


@pytest.mark.parametrize("bits", SSS_PAGES)
def test_supervisor_shadow_stack_pages(bits: tuple[int, int, int, int]) -> None:
    """Shadow stack accesses of supervisors reach such pages alone, writes too, whatever R/W of the last entry."""
    case, marked = _sss(bits), bits[1:3] == (1, 0)
    for access, wrote in ((SHADOW_READ, 0), (SHADOW_WRITE, 2)):
        denied = ("#NPF", 0x1_0000_0045 | wrote | (1 << 37 if marked else 0), GVA)
        assert case.outcome(GVA, access) == (("sPA", PAGE | 0xABC) if SSS_PAGES[bits] else denied)


def test_other_accesses_to_supervisor_shadow_stack_pages() -> None:
    """15.25.7: U/S=0 keeps all others out; the page is told from others by bit 37."""
    case = _sss((1, 1, 0, 1))
    for access, own in (("read", 0), ("write", 2), ("user read", 0), ("user write", 2), ("fetch", 0x10)):
        assert case.outcome(GVA, access) == ("#NPF", 0x21_0000_0005 | own, GVA)


@pytest.mark.parametrize("registers", [{"host_efer": 0x1500}, {"np_control": 1}])
def test_supervisor_shadow_stack_check_off(registers: dict[str, int]) -> None:
    """Silently ignored while the host has EFER.NXE=0; off without bit 4. Then such an access is one like others."""
    case = _sss((1, 0, 1, 1), **registers)
    assert case.outcome(GVA, SHADOW_READ) == ("sPA", PAGE | 0xABC)


def test_supervisor_shadow_stack_check_of_a_host_in_32_bit_mode() -> None:
    case = Case(cr0=1, cr4=0, efer=0x1000, np_control=1 | 1 << 4, ncr3=0x1000, host_cr4=0, host_efer=0x1000,
                features=frozenset({"sss"}))
    case.put(0x1000, 0x2007, 4)
    case.put(0x2014, 0x9007, 4)
    assert case.outcome(0x5678, SHADOW_READ) == ("sPA", 0x9678)


# Section 5.7.2: R/W above, R/W, D and U/S of the last entry, and what may be done by which shadow stack
@pytest.mark.parametrize("cr4", [0x20, 0x20 | SMAP])
def test_guest_shadow_stack_pages(cr4: int) -> None:
    """5.7.3; and 5.6.6: shadow stack accesses are not subject to SMAP."""
    for above, rw, dirty, us in product((0, 1), repeat=4):
        case = _case((("U", "W"),) * 4, True).but(cr4=cr4)
        case.put(AT[1], case.get(AT[1]) & ~2 | above << 1)
        case.put(AT[3], case.get(AT[3]) & ~6 | us << 2 | rw << 1 | dirty << 6)
        for user, write in product((False, True), repeat=2):
            outcome = case.outcome(GVA, Access(write=write, user=user, shadow_stack=True))
            if (above, rw, dirty, us) == (1, 0, 1, int(user)):
                assert outcome == ("sPA", PAGE | 0xABC)
            else:
                assert outcome == ("#PF", 0x41 | (2 if write else 0) | (4 if user else 0))


def test_users_shadow_stacks_are_not_subject_to_the_supervisor_check() -> None:
    """15.25.14 is about supervisor shadow stack accesses: a user's are ordinary user accesses to the nested tables."""
    user_write = Access(write=True, user=True, shadow_stack=True)
    assert _sss((1, 0, 1, 1)).outcome(GVA, user_write) == ("sPA", PAGE | 0xABC)
    assert _sss((1, 1, 0, 1)).outcome(GVA, user_write) == ("#NPF", 0x21_0000_0047, GVA)
