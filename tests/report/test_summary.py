"""A run as one value: sums, errata that were met, the machine's identity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from harness.errors import MachineLost
from harness.report.summary import Summary, describe_machine, errata_of, identity_of, is_new, summarize
from tests.report.cases import NAME, SCENARIO, divergence, erratum, result


class TestOutdated:
    """Errata that are said to be of this version and did not show."""

    SHOWN = replace(erratum("e3"), machine="qemu-tcg", shown=("other", "elsewhere"), since=(7, 2))

    def outdated(self, version: tuple[int, int, int] = (7, 2, 22), **values: Any) -> list[str]:
        layers = (("qemu-tcg", version),)
        values = {"identity": replace(Identity(), layers=layers), "errata": [self.SHOWN]} | values
        return [one.id for one in summary(**values).outdated]

    def test_told(self) -> None:
        assert self.outdated() == ["e3"]

    def test_not_of_other_versions(self) -> None:
        assert self.outdated((7, 1, 0)) == []

    def test_not_if_it_showed_somewhere(self) -> None:
        assert self.outdated(results=[result(divergence(erratum="e3")), result(scenario="other")]) == []

    def test_not_if_no_scenario_that_shows_it_ran(self) -> None:
        assert self.outdated(results=[result(divergence())]) == []
        assert self.outdated(results=[result(scenario="other", lost=MachineLost("gone"))]) == []
        assert self.outdated(results=[result(scenario="other", skipped="no la57")]) == []


@dataclass(frozen=True)
class Identity:
    machine: str = "tcg"
    qemu: str = "/usr/bin/qemu-system-x86_64"
    qemu_version: tuple[int, int, int] = (7, 2, 22)
    cpu_model: str = "max"
    maxphyaddr: int = 40
    svm_revision: int = 1
    asids: int = 16
    svm_features: int = 0x11
    features: tuple[str, ...] = ("nx", "page1g")
    layers: tuple[tuple[str, tuple[int, ...]], ...] = (("qemu-tcg", (7, 2, 22)),)


def summary(**values: Any) -> Summary:
    """Two scenarios were run: one with two new divergences and a known one, one with two known ones."""
    other = replace(SCENARIO, name="other")
    base: dict[str, Any] = {
        "identity": Identity(),
        "scenarios": [SCENARIO, other, replace(SCENARIO, name="third")],
        "results": [
            result(divergence(), divergence(probe=2), divergence(erratum="e1")),
            result(divergence(erratum="e1"), divergence(erratum="e1+e2"), scenario="other"),
        ],
        "errata": [erratum("e1"), erratum("e2"), erratum("e3")],
        "seconds": 2.5,
    }
    return summarize(**base | values)


def test_totals() -> None:
    totals = summary().totals
    assert (totals.scenarios, totals.vmruns, totals.probes, totals.table_bytes_compared) == (2, 6, 24, 8192)
    assert (totals.divergences_new, totals.divergences_known, totals.seconds) == (2, 3, 2.5)


def test_strict_counts_known_ones_as_new() -> None:
    totals = summary(strict=True).totals
    assert (totals.divergences_new, totals.divergences_known) == (5, 0)
    assert summary(strict=True).known == summary().known


def test_known_errata_with_counts() -> None:
    """Where two errata explain a divergence only together, it counts for each; those not met are left out."""
    assert [(k.erratum.id, k.count, k.scenarios) for k in summary().known] == [("e1", 3, 2), ("e2", 1, 1)]


def test_an_erratum_that_is_not_in_the_list() -> None:
    known = summary(errata=[]).known
    assert [k.erratum.id for k in known] == ["e1", "e2"] and "not in the list" in known[0].erratum.title


def test_not_run_and_lost() -> None:
    assert summary().not_run == ("third",) and summary().lost == ()
    lost = result(scenario="third", lost=MachineLost("gone"))
    assert summary(results=[lost]).lost == (lost,) and summary(results=[lost]).not_run == (NAME, "other")


def test_one_divergence() -> None:
    assert is_new(divergence()) and not is_new(divergence(erratum="e")) and is_new(divergence(erratum="e"), strict=True)
    assert errata_of(divergence()) == () and errata_of(divergence(erratum="a+b")) == ("a", "b")


def test_identity() -> None:
    identity = identity_of(Identity())
    assert identity is not None
    assert identity["qemu_version"] == "7.2.22" and identity["features"] == ["nx", "page1g"]
    assert identity["maxphyaddr"] == 40
    assert identity_of(None) is None
    with pytest.raises(AssertionError):
        identity_of("tcg")


def test_description() -> None:
    assert describe_machine(identity_of(Identity())) == (
        "tcg: QEMU 7.2.22 (/usr/bin/qemu-system-x86_64), CPU max, 40 physical address bits, 16 ASIDs, "
        "SVM revision 1 with features 0x11, nx page1g")
    assert describe_machine(None) == "the machine never came up"


def test_what_nobody_asked_is_not_told() -> None:
    """No machine has SVM revision 0, or microcode 0: it is not known; no features at all are some."""
    known = describe_machine({"machine": "tcg", "svm_revision": 1, "svm_features": 0, "microcode": 5})
    assert known == "tcg: microcode 0x5, SVM revision 1 with features 0x0"
    assert describe_machine({"machine": "tcg", "svm_revision": 0, "svm_features": 0, "microcode": 0}) == "tcg:"


def test_description_of_a_machine_that_is_not_known_yet() -> None:
    """Nothing of an identity is left out, whatever its names are."""
    text = describe_machine({"machine": "kvm", "kernel_version": "6.12.9", "nested": 1})
    assert text == "kvm: kernel_version 6.12.9, nested 1"
    both = describe_machine({"machine": "kvm", "kernel": "6.12.9-amd64", "kernel_version": "6.12.9", "nested": 1})
    assert both == "kvm: Linux 6.12.9 (6.12.9-amd64), nested 1"


class TestFound:
    """What is new, by signature."""

    def test_counted(self) -> None:
        one = divergence(field="value", expected=1, observed=2)
        twice = [one, one._replace(probe=2, expected=3)]
        once = divergence(check="C3", field="l1.cr4", expected=1, observed=0)
        lost = MachineLost("QEMU exited with status 1")
        found = summary(results=[
            result(once), result(*twice, divergence(probe=3, field="exitinfo1", erratum="e1"), scenario="other"),
            result(lost=lost, scenario="third"),
        ]).found
        assert [(str(one.signature), one.count, one.scenario) for one in found] == [
            ("C1 value, rule exit.host", 2, "other"), ("C3 l1.cr4, rule exit.host", 1, NAME),
            ("lost QEMU exited with status ...", 1, "third"),
        ]
        assert found[1].what == "#VMEXIT did not give L1 its CR4 back: VME is missing (rule exit.host)"

    def test_strict_has_the_known_ones_too(self) -> None:
        assert not summary(results=[result(divergence(erratum="e1"))]).found
        assert len(summary(results=[result(divergence(erratum="e1"))], strict=True).found) == 1
