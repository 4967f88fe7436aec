"""The `--junit` file: JUnit XML, one test case for each scenario.

A new divergence is a failure, with both walks as its text; a lost machine is an error; a known erratum
is named in the case's output, and so is a finding's bundle; a scenario that was not run is skipped.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Final

from harness.lockstep.result import Result
from harness.report import output
from harness.report.findings import findings
from harness.report.headline import headline
from harness.report.styled import MAX_WIDTH, harmless, plain
from harness.report.summary import Summary, errata_of, is_new
from harness.report.walks import draw
from harness.scenario.ops import Scenario

_DRAWN: Final = 2
"""Findings of one scenario that are drawn in full; of others there is the headline."""

_ROOT: Final = "scenarios"


def write(path: Path, summary: Summary) -> None:
    """After a run: all of the file or nothing. Raises TwinwalkError if that fails after all."""
    output.write(path, text(summary))


def text(summary: Summary) -> str:
    """The whole document. It is well-formed whatever a guest or a machine wrote: what XML cannot hold is
    left out."""
    cases = [_case(result, summary) if not result.skipped else _skipped(result.scenario, summary, result.skipped)
             for result in summary.results]
    cases += [_skipped(name, summary, "the run ended before this scenario") for name in summary.not_run]
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": sum(case.find("error") is not None for case in cases),
        "skipped": len(summary.not_run) + len(summary.skipped),
    }
    root = ET.Element("testsuites", _attributes(name="twinwalk", **counts, time=f"{summary.totals.seconds:.3f}"))
    suite = ET.SubElement(root, "testsuite", dict(root.attrib))
    properties = ET.SubElement(suite, "properties")
    for name, value in (summary.machine or {}).items():
        value = " ".join(map(str, value)) if isinstance(value, list) else value
        ET.SubElement(properties, "property", _attributes(name=name, value=value))
    suite.extend(cases)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _attributes(**values: object) -> dict[str, str]:
    return {name: harmless(str(value)) for name, value in values.items()}


def class_name(name: str, scenario: Scenario | None) -> str:
    """Folder and family of a scenario, in dots: `walk.nested-write` for scenarios/walk/nested-write.toml."""
    family = name.partition("[")[0].replace("/", ".")
    if scenario is None or not scenario.source:
        return family
    path = Path(scenario.source).with_suffix("")
    folders = path.parent.parts
    folders = folders[folders.index(_ROOT) + 1 :] if _ROOT in folders else folders[-1:]
    return ".".join([*(folder for folder in folders if folder not in ("/", ".", "..")), path.name])


def _case(result: Result, summary: Summary) -> ET.Element:
    scenario = summary.scenarios.get(result.scenario)
    case = ET.Element("testcase", _attributes(classname=class_name(result.scenario, scenario), name=result.scenario))
    if any(is_new(d, summary.strict) for d in result.divergences):
        message, body = failure(result, scenario, summary.strict)
        ET.SubElement(case, "failure", _attributes(type="divergence", message=message)).text = harmless(body)
    if result.lost is not None:
        attributes = _attributes(type="MachineLost", message=result.lost.reason)
        ET.SubElement(case, "error", attributes).text = harmless(str(result.lost))
    said = [*_bundles(result, summary), *_known(result, summary)]
    if said:
        ET.SubElement(case, "system-out").text = harmless("\n".join(said))
    return case


def failure(result: Result, scenario: Scenario | None, strict: bool) -> tuple[str, str]:
    """The first new finding's headline, and all new findings, the first ones drawn."""
    new = [finding for finding in findings(result.divergences) if finding.is_new(strict)]
    parts = [plain(draw(finding, scenario, MAX_WIDTH)) for finding in new[:_DRAWN]]
    parts += [headline(finding, scenario) for finding in new[_DRAWN:]]
    return headline(new[0], scenario), "\n" + "\n\n".join(parts) + "\n"


def _bundles(result: Result, summary: Summary) -> list[str]:
    """Of findings that this scenario was the first to show."""
    return [f"bundle {one.bundle}" for one in summary.found if one.bundle and one.scenario == result.scenario]


def _known(result: Result, summary: Summary) -> list[str]:
    counts = Counter(name for d in result.divergences for name in errata_of(d))
    titles = {known.erratum.id: known.erratum.title for known in summary.known}
    return [f"known erratum {name}: {titles.get(name, '')} (divergences: {counts[name]})" for name in counts]


def _skipped(name: str, summary: Summary, why: str) -> ET.Element:
    case = ET.Element("testcase", _attributes(classname=class_name(name, summary.scenarios.get(name)), name=name))
    ET.SubElement(case, "skipped", _attributes(message=why))
    return case
