"""The `--junit` file: what is a failure, an error, a pass, and that it is XML whatever is in it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import MachineLost
from harness.model.entries import RW
from harness.report import junit
from tests.model.tables import WRITE
from tests.report.cases import NAME, SCENARIO, Case, divergence, result, went_through
from tests.report.test_summary import summary


def suite(**values: Any) -> ET.Element:
    root = ET.fromstring(junit.text(summary(**values)))
    assert root.tag == "testsuites" and [child.tag for child in root] == ["testsuite"]
    return root[0]


def cases(**values: Any) -> dict[str, ET.Element]:
    return {case.attrib["name"]: case for case in suite(**values).findall("testcase")}


def test_one_case_for_each_scenario() -> None:
    """In the order of the run; those without a result at the end."""
    assert list(cases()) == [NAME, "other", "third"]
    assert cases()[NAME].attrib == {"classname": "walk.nested-write", "name": NAME}


def test_counts() -> None:
    assert suite().attrib == {
        "name": "twinwalk", "tests": "3", "failures": "1", "errors": "0", "skipped": "1", "time": "2.500",
    }
    assert suite(results=[result(lost=MachineLost("gone"))]).attrib["errors"] == "1"
    assert suite(strict=True).attrib["failures"] == "2"


def test_a_new_divergence_is_a_failure_with_the_walks() -> None:
    case = Case()
    case.space.change(case.final["pte"], clear=RW)
    failure = cases(results=[result(went_through(case, case.walk(WRITE, 8)))])[NAME].find("failure")
    assert failure is not None and failure.text is not None
    assert failure.attrib == {"type": "divergence", "message": (
        "The machine let L2 write sPA 0x654008: the nested pte for the page itself has R/W=0; manual 15.25.7.")}
    assert "nested walk of gPA" in failure.text and "  > " in failure.text and "rule nested.write" in failure.text


def test_many_findings_are_not_all_drawn() -> None:
    walk = Case().walk()
    found = [divergence(walk, probe=n, field="value", expected=1, observed=2) for n in range(9)]
    failure = cases(results=[result(*found)])[NAME].find("failure")
    assert failure is not None and failure.text is not None
    assert failure.text.count("nested walk of gPA") == 5 * 2
    assert failure.text.count("returned a wrong value: it is") == 8
    assert failure.text.count("`fetch a` came to") == 1


def test_a_known_one_is_a_pass_with_a_word() -> None:
    case = cases()["other"]
    assert case.find("failure") is None
    assert case.findtext("system-out") == (
        "known erratum e1: title of e1 (divergences: 2)\nknown erratum e2: title of e2 (divergences: 1)")
    assert cases(strict=True)["other"].find("failure") is not None


def test_new_and_known() -> None:
    """The failure is about what is new; the first new finding gives the message."""
    known = divergence(probe=0, check="C3", field="l1.cr3", expected=1, observed=2, erratum="e1")
    new = divergence(probe=1, check="C3", field="l1.cr4", expected=0x20, observed=0)
    case = cases(results=[result(known, new)])[NAME]
    failure = case.find("failure")
    assert failure is not None and "CR4" in failure.attrib["message"] and "CR3" not in (failure.text or "")
    assert case.findtext("system-out") is not None


def test_a_plain_pass() -> None:
    assert list(cases(results=[result()])[NAME]) == []


def test_a_lost_machine_is_an_error() -> None:
    lost = MachineLost("QEMU exited", ["qemu"], "last words", "#1 ENTER, probe 0")
    case = cases(results=[result(divergence(), lost=lost)])[NAME]
    error = case.find("error")
    assert error is not None and error.text == str(lost)
    assert error.attrib == {"type": "MachineLost", "message": "QEMU exited"}
    assert case.find("failure") is not None


def test_what_was_not_run_is_skipped() -> None:
    assert cases()["third"].find("skipped") is not None
    assert cases()["other"].find("skipped") is None


def test_machine() -> None:
    properties = {p.attrib["name"]: p.attrib["value"] for p in suite().iterfind("properties/property")}
    assert properties["qemu_version"] == "7.2.22" and properties["features"] == "nx page1g"
    assert suite(identity=None).find("properties/property") is None


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("a[x,y]", "/repo/scenarios/walk/a.toml", "walk.a"),
        ("a", "/repo/scenarios/a.toml", "a"),
        ("a", "scenarios/large/deep/a.toml", "large.deep.a"),
        ("a", "/tmp/bug/a.toml", "bug.a"),
        ("a", "a.toml", "a"),
        ("a", "../a.toml", "a"),
        ("a", "/a.toml", "a"),
        ("a[x]", "", "a"),
    ],
)
def test_class_name(name: str, source: str, expected: str) -> None:
    assert junit.class_name(name, replace(SCENARIO, name=name, source=source)) == expected


def test_class_name_without_scenario() -> None:
    assert junit.class_name("walk/a[x/y]", None) == "walk.a"


@given(st.text(st.characters()), st.binary())
def test_any_bytes_make_xml(text: str, data: bytes) -> None:
    """Of a guest's console, of a scenario's name, of what a machine said."""
    log = data.decode("utf-8", "surrogateescape") + text
    lost = MachineLost(log, [log], log, log)
    one = divergence(field=log, check="C3", expected=log, observed=log, rule=log, erratum=None)
    scenario = replace(SCENARIO, name=text, source=text.replace("\0", ""))
    suite(results=[result(one, lost=lost, scenario=text)], scenarios=[scenario])


def test_markup_is_text() -> None:
    case = cases(results=[result(lost=MachineLost("]]></error><x a='\"'>&amp;"))])[NAME]
    assert case.findtext("error") == "machine lost: ]]></error><x a='\"'>&amp;"


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "x.xml"
    junit.write(path, summary())
    assert ET.parse(path).getroot().tag == "testsuites"
    assert path.read_text().startswith('<?xml version="1.0" encoding="utf-8"?>\n')
