"""Errata: of which machine and version they are, and exactly which divergences they explain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.errors import UsageError
from harness.lockstep.compare import Divergence
from harness.lockstep.errata import Erratum, Known, explain, load, of_layers, quirks_of
from harness.model.access import Reached
from harness.model.walk import Walk
from harness.scenario import files
from tests.conftest import LIBRARY

ENTRY = 0x100_0008


def erratum(**changes: Any) -> Erratum:
    values: dict[str, Any] = {
        "id": "e1", "title": "t", "machine": "qemu-tcg", "checks": ("C1",), "fields": ("exitinfo1",),
        "rules": ("nested.reserved",), "explanation": "e", "reference": "r",
    }
    return Erratum(**values | changes)


def divergence(**changes: Any) -> Divergence:
    values: dict[str, Any] = {
        "scenario": "s", "op": 1, "probe": 2, "check": "C1", "field": "exitinfo1", "expected": 0xF, "observed": 0xE,
        "rule": "nested.reserved",
    }
    return Divergence(**values | changes)


@pytest.mark.parametrize(
    ("since", "until", "version", "holds"),
    [
        (None, None, (7, 2, 22), True),
        ((7, 2), None, (7, 2, 0), True),
        ((7, 2), None, (7, 1, 99), False),
        ((7, 2), None, (10, 0, 0), True),
        ((7, 2, 15), None, (7, 2, 14), False),
        ((7, 2, 15), None, (7, 2, 15), True),
        (None, (7, 2), (7, 2, 22), True),  # two numbers cover all of the third
        (None, (7, 2), (7, 3, 0), False),
        (None, (9, 1, 1), (9, 1, 1), True),
        (None, (9, 1, 1), (9, 1, 2), False),
        ((5, 2), (7, 2, 14), (7, 2, 22), False),
        ((5,), (7,), (7, 99, 0), True),
        ((9,), (11,), (10, 0, 13), True),  # numbers, not text
    ],
)
def test_versions(since: tuple[int, ...] | None, until: tuple[int, ...] | None, version: tuple[int, ...],
                  holds: bool) -> None:
    assert erratum(since=since, until=until).holds_for("qemu-tcg", version) is holds
    assert not erratum(since=since, until=until).holds_for("kvm", version)


@pytest.mark.parametrize(
    ("version", "holds"),
    [
        ((6, 1, 174), True), ((6, 1, 175), False), ((6, 1, 192), False), ((5, 10, 262), True),
        ((6, 12, 85), True), ((6, 12, 86), False), ((6, 18, 15), True),  # a series that was not mended
        ((7, 0, 13), True), ((7, 1, 0), False), ((7, 3, 4), False),
    ],
)
def test_versions_that_were_mended(version: tuple[int, ...], holds: bool) -> None:
    fixed = ((6, 1, 175), (6, 12, 86), (7, 1))
    assert erratum(machine="kvm", fixed=fixed).holds_for("kvm", version) is holds


@pytest.mark.parametrize(
    ("predicate", "observation", "matches"),
    [
        ({}, {}, True),
        ({}, {"check": "C2"}, False),
        ({}, {"field": "exitinfo2"}, False),
        ({"fields": ("exit*",)}, {"field": "exitinfo2"}, True),
        ({"fields": ("entry at sPA *",)}, {"field": "entry at sPA 0x1000"}, True),
        ({}, {"rule": "nested.present"}, False),
        ({"rules": ("nested.*", "guest.*")}, {"rule": "guest.reserved"}, True),
        ({"rules": ("*",)}, {"rule": "anything"}, True),
        ({"differs": (1,)}, {}, True),
        ({"differs": (1,)}, {"observed": 0xD}, False),
        ({"differs": (2, 3)}, {"observed": 0xD}, True),
        ({"differs": (1,)}, {"expected": "unchanged"}, False),
        ({"differs": (1,)}, {"observed": "unchanged"}, False),
        ({"expected": "^0xf$"}, {}, True),
        ({"expected": "^0xf$"}, {"expected": 0xFF}, False),
        ({"observed": "INVALID"}, {"expected": "x", "observed": "VMEXIT_INVALID, EXITINFO1 0x0"}, True),
        ({"observed": "INVALID"}, {"observed": 1}, False),
        ({"checks": ("C2", "C1")}, {}, True),
    ],
)
def test_predicate(predicate: dict[str, Any], observation: dict[str, Any], matches: bool) -> None:
    assert erratum(**predicate).matches(divergence(**observation)) is matches


def _walk(*addresses: int, entry: int = 0x7) -> Walk:
    return Walk(Reached(0, 0), "reached", [("nested", "pte", "final", at, entry) for at in addresses], [])


class TestExplain:
    def test_names_the_first_that_matches(self) -> None:
        (out,) = explain([divergence()], Known([erratum(id="no", checks=("C3",)), erratum(), erratum(id="later")]))
        assert out.erratum == "e1"

    def test_leaves_others_new_and_in_place(self) -> None:
        out = explain([divergence(field="cr2", check="C3"), divergence(), divergence(probe=3, rule="x")],
                      Known([erratum()]))
        assert [d.erratum for d in out] == [None, "e1", None]

    def _bits(self, **changes: Any) -> Divergence:
        values = {"check": "C2", "field": f"entry at sPA {ENTRY:#x}", "expected": 0x7, "observed": 0x27, "rule": "ad"}
        return divergence(**values | changes)

    @pytest.mark.parametrize(
        ("changes", "follows"),
        [
            ({}, True),
            ({"expected": 0x27, "observed": 0x7}, True),
            ({"observed": 0x67}, True),
            ({"expected": "unchanged", "observed": 0x47}, True),
            ({"expected": 0x27, "observed": "unchanged"}, True),
            ({"observed": 0x2F}, False),  # more than A and D
            ({"expected": "unchanged", "observed": 0x5}, False),
            ({"op": 2}, False),
            ({"probe": 1}, False),
            ({"check": "C1"}, False),
            ({"field": "entry at sPA 0x9999000"}, False),  # no entry of that walk
            ({"field": f"entry at sPA {ENTRY + 8:#x}"}, False),
            ({"field": "cr2", "check": "C3"}, False),
        ],
    )
    def test_consequences(self, changes: dict[str, Any], follows: bool) -> None:
        """Accessed and dirty bits of the same probe's walk belong to an erratum that says so."""
        cause = divergence(walk=_walk(ENTRY))
        for order in (0, 1):
            found = [cause, self._bits(**changes)]
            out = explain(found[::-1] if order else found, Known([erratum(consequences=True)]))
            assert {d.erratum for d in out} == ({"e1"} if follows else {"e1", None})
        assert None in {d.erratum for d in explain([cause, self._bits()], Known([erratum()]))}

    def test_no_cause_no_consequence(self) -> None:
        assert explain([self._bits(walk=_walk(ENTRY))], Known([erratum(consequences=True)]))[0].erratum is None
        out = explain([divergence(walk=None), self._bits()], Known([erratum(consequences=True)]))
        assert out[1].erratum is None


GOOD = '''[[erratum]]
id = "a"
title = "t"
machine = "qemu-tcg"
since = "5.2"
until = "7.2.14"
checks = ["C1"]
fields = ["exitinfo1"]
rules = ["*"]
differs = [1]
explanation = "e"
reference = "r"
consequences = true
'''


class TestLoad:
    def test_good(self, tmp_path: Path) -> None:
        (tmp_path / "x.toml").write_text(GOOD)
        (found,) = load(tmp_path)
        assert (found.since, found.until, found.differs, found.consequences) == ((5, 2), (7, 2, 14), (1,), True)
        assert load(tmp_path / "empty") == []

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (("id = ", "name = "), "'name' is unknown"),
            (('machine = "qemu-tcg"\n', ""), "'machine' is missing"),
            (('reference = "r"\n', ""), "'reference' is missing"),
            (('explanation = "e"\n', ""), "'explanation' is missing"),
            (('checks = ["C1"]', 'checks = "C1"'), "'checks' is unknown, or not a list"),
            (("consequences = true", 'consequences = "yes"'), "'consequences' is unknown, or not a bool"),
            (('since = "5.2"', 'since = "old"'), "'since' must be a version such as 7.2, not 'old'"),
            (('since = "5.2"', "since = 5.2"), "'since' is unknown, or not a str"),
            (('rules = ["*"]', 'rules = ["*"]\nobserved = "("'), "'observed' is no regular expression"),
            (("[[erratum]]", "[[erratum]"), "x.toml"),
        ],
    )
    def test_bad(self, change: tuple[str, str], reason: str, tmp_path: Path) -> None:
        (tmp_path / "x.toml").write_text(GOOD.replace(*change))
        with pytest.raises(UsageError, match=reason) as caught:
            load(tmp_path)
        assert "x.toml" in str(caught.value) and caught.value.exit_code == 2

    def test_two_of_a_name(self, tmp_path: Path) -> None:
        (tmp_path / "x.toml").write_text(GOOD)
        (tmp_path / "y.toml").write_text(GOOD)
        with pytest.raises(UsageError, match=r"y\.toml.*two errata 'a'"):
            load(tmp_path)

    def test_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "x.toml").write_bytes(b"\xff")
        with pytest.raises(UsageError, match=r"x\.toml"):
            load(tmp_path)

    def test_an_unknown_top_level_name_is_no_silence(self, tmp_path: Path) -> None:
        """A file whose table is misspelt would explain nothing, and say nothing."""
        (tmp_path / "x.toml").write_text(GOOD.replace("[[erratum]]", "[[errata]]"))
        with pytest.raises(UsageError, match=r"x\.toml"):
            load(tmp_path)

    def test_the_librarys(self) -> None:
        for one in load(LIBRARY / "errata"):
            assert one.reference.strip() and len(one.explanation) > 20
            assert one.checks or one.quirk or one.hazard, "a predicate, a quirk or a hazard"
            if one.checks:
                assert set(one.checks) <= {"C1", "C2", "C3", "C4"} and one.fields and one.rules
                # narrow: not every divergence of a check is its own
                assert not ("*" in one.fields and "*" in one.rules), one.id


def test_layers() -> None:
    """Below a hypervisor only those errata count that surface, and their quirks are of L2's own walks."""
    kvm = erratum(id="a", machine="kvm", quirk="g-pat-unchecked")
    hidden = erratum(id="b", quirk="pdpe-unchecked")
    through = erratum(id="c", quirk="pml4e-bit-8", checks=("C1",), surfaces=True)
    plain = erratum(id="d", surfaces=True)
    errata = [plain, through, hidden, kvm]
    layers = [("kvm", (6, 1, 192)), ("qemu-tcg", (7, 2, 22))]
    found = of_layers(errata, layers)
    assert [one.id for one in found] == ["a", "d", "c"]
    assert quirks_of(found) == {"g-pat-unchecked": "a", "pml4e-bit-8 below a hypervisor": "c"}
    assert not found[2].checks, "L1's own table is the hypervisor's business"
    assert of_layers(errata, layers[1:]) == [plain, through, hidden]


BY_CHANCE = ("kvm-reserved-event-lost", "qemu-tcg-shadow-lost")
"""Errata that no scenario is sure to show."""


def test_each_says_what_shows_it(errata: list[Erratum]) -> None:
    """By names of the library's scenarios; a run then tells where an erratum is stale."""
    names = {scenario.name for scenario in files.load([LIBRARY])}
    for one in errata:
        assert one.shown or one.id in BY_CHANCE, f"{one.id}: no scenario shows it"
        assert names.issuperset(one.shown), f"{one.id}: {set(one.shown) - names} are no scenarios"
