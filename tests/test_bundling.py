"""Bundles made of a run's findings, and replayed, on machines without QEMU that have a fault planted in them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from harness.bundling import Setup, make, of_run, options_of, our_version, watch
from harness.errors import LaunchFailed
from harness.lockstep.signature import Signature
from harness.machine import kvm_on_tcg
from harness.model.registers import Cpu
from harness.report import jsonfile, junit
from harness.report.bundle import read
from harness.report.summary import Summary, summarize
from harness.run import run
from harness.target import Target
from harness.wire.image import Image
from tests.lockstep.fake import Plant
from tests.report.cases import erratum
from tests.scenario.texts import one
from tests.test_run import FakeTarget
from tests.test_shrinking import DIES, SHORT, VALUE, Dies, Errs, ErrsAfter


@pytest.fixture
def target(image: Image, cpu: Cpu) -> FakeTarget:
    return FakeTarget(image=image, of=cpu)


def setup(target: FakeTarget, plant: Plant) -> Setup:
    target.plants[:] = [plant]
    return Setup(target, (), pipelined=True, strict=False)


def test_a_bundle(target: FakeTarget, tmp_path: Path) -> None:
    found = read(make(setup(target, Errs()), VALUE, SHORT, (), "./twinwalk run x", tmp_path))
    about = found.about
    assert about.signature == VALUE and (about.kind, about.seen, about.tried) == ("stable", 10, 10)
    assert (about.found_in, about.ops, about.command, about.twinwalk) == ("short", 1, "./twinwalk run x", our_version())
    assert about.machine["qemu"] == "fake-machine" and about.target == options_of(target)
    assert [str(probe) for op in found.scenario.ops for probe in op.probes] == ["read a+0x450"]  # type: ignore[union-attr]
    assert found.scenario.title.startswith("`read a+0x450` returned a wrong value")
    assert found.scenario.manual == "15.25.5"
    assert [record["kind"] for record in found.records] == ["ENTER", "EXIT"]
    assert found.records[1]["vmcb"]["exitcode"] == "0x81" and found.records[1]["results"].keys() == {"0"}
    assert found.walks.startswith("C1 value, rule exit.vmmcall\nstable\n\nshort: `read a+0x450` returned a wrong ")
    assert "entry" in found.walks and "outcome" in found.walks
    assert found.walks.count("short: `read a+0x450` returned a wrong ") == 1, "told once, before what else there is"


def test_of_a_loss(target: FakeTarget, tmp_path: Path) -> None:
    found = read(make(setup(target, Dies()), DIES, SHORT, (), "", tmp_path))
    assert (found.about.check, found.about.kind, found.about.seen) == ("lost", "stable", 3)
    assert "machine lost: planted" in found.walks and [record["kind"] for record in found.records] == ["ENTER"]


def test_with_what_ran_before(target: FakeTarget, tmp_path: Path) -> None:
    before = [one("read b", name="other"), one("read a+0x778", name="needed")]
    on = setup(target, ErrsAfter())
    found = read(make(on, VALUE, SHORT, before, "", tmp_path))
    assert found.about.kind == "depends on what ran before"
    assert [scenario.name for scenario in found.before] == ["needed"]
    assert watch(on, found.scenario, found.before).shows(VALUE, strict=False)
    assert not watch(on, found.scenario, ()).shows(VALUE, strict=False)


def test_not_seen_again(target: FakeTarget, tmp_path: Path) -> None:
    found = read(make(setup(target, Plant()), VALUE, SHORT, (), "", tmp_path))
    assert (found.about.kind, found.about.seen) == ("flaky", 0) and found.scenario.ops == SHORT.ops
    assert found.walks.endswith("It was not seen again.\n")


def summary(target: FakeTarget, plant: Plant) -> Summary:
    target.plants[:] = [plant]
    scenarios = [one("read d", name="before"), SHORT, one("read a+0x450; read b", name="again")]
    outcome = run(target, scenarios, pipelined=True)
    assert outcome.before == {"short": (scenarios[0],)}
    return summarize(outcome.identity, scenarios, outcome.results, [erratum()], 1.0)


def test_of_a_run(target: FakeTarget, tmp_path: Path) -> None:
    """One bundle for each signature; JSON and JUnit say where it is."""
    before = summary(target, Errs())
    assert [(found.signature, found.count, found.bundle) for found in before.found] == [(VALUE, 2, "")]
    after = of_run(setup(target, Errs()), before, {}, "./twinwalk run", tmp_path)
    (path,) = tmp_path.iterdir()
    assert [found.bundle for found in after.found] == [str(path)]
    assert json.loads(jsonfile.text(after))["findings"][0]["bundle"] == str(path)
    said = {case.get("name"): case.findtext("system-out") for case in ET.fromstring(junit.text(after)).iter("testcase")}
    assert said == {"before": None, "short": f"bundle {path}", "again": None}


def test_one_that_cannot_be_made_is_told(target: FakeTarget, tmp_path: Path) -> None:
    told: list[str] = []
    before = summary(target, Errs())
    quiet = FakeTarget(image=target.image, of=target.of, plants=[Errs()], say=told.append)
    after = of_run(Setup(quiet, (), True, False), before, {}, "", tmp_path / "none")
    assert after.found == before.found and told[-1].startswith("no bundle of it: no bundle could be written to ")


def test_of_the_most_frequent(target: FakeTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is wrong in many ways does not take forever: the rest is told, and stays among what was found."""
    told: list[str] = []
    before = summary(target, Errs())
    many = replace(before, found=tuple(replace(before.found[0], count=9 - n) for n in range(4)))
    monkeypatch.setattr("harness.bundling.MAX_BUNDLES", 1)
    quiet = FakeTarget(image=target.image, of=target.of, plants=[Errs()], say=told.append)
    after = of_run(Setup(quiet, (), True, False), many, {}, "", tmp_path)
    assert [bool(one.bundle) for one in after.found] == [True, False, False, False] and len([*tmp_path.iterdir()]) == 1
    assert told[0].startswith("bundle 1 of 1: ") and told[-1].startswith("no bundle of 3 more findings")


def test_a_target_in_plain_values() -> None:
    host = kvm_on_tcg.Options(Path("bzImage"), Path("build"), ("npt=0",), "4k")
    assert options_of(Target("kvm-on-tcg", "qemu", "EPYC", ("-d", "int"), host)) == {
        "machine": "kvm-on-tcg", "qemu": "qemu", "cpu": "EPYC", "qemu_args": ["-d", "int"], "kernel": "bzImage",
        "modules": "build", "kvm_parameters": ["npt=0"], "l1_pages": "4k"}


def test_the_machine_does_not_start(target: FakeTarget) -> None:
    class Broken(FakeTarget):
        def start(self):  # type: ignore[no-untyped-def]
            raise LaunchFailed("no such machine")

    with pytest.raises(LaunchFailed):
        watch(Setup(Broken(), (), True, False), SHORT, ())
    assert Signature(*VALUE) == VALUE
