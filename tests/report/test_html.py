"""The page of a run: what is in it, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from harness.errors import MachineLost
from harness.lockstep.result import Result
from harness.model.access import Access
from harness.model.entries import RW
from harness.model.registers import Cpu
from harness.model.universe import FEATURES, universe
from harness.report import html, matrix
from harness.report.summary import Summary, summarize
from tests.report.browser import SLOW, complaints, needs_browser, texts, unreadable
from tests.report.cases import NAME, SCENARIO, Case, divergence, erratum, extra_d, missing_a, result, went_through
from tests.report.test_matrix import MATRIX
from tests.report.test_summary import Identity

WRITE = Access(write=True)


def _denied() -> tuple[Case, Any]:
    """A write that the nested PTE of the page forbids, and that the machine lets through."""
    case = Case()
    at = case.final["pte"]
    case.space.set(at, case.space.get(at) & ~RW)
    return case, case.walk(WRITE)


def _summary(*results: Result) -> Summary:
    return summarize(None, [SCENARIO], results, [erratum()], 1.0)


@pytest.fixture(scope="module")
def summary() -> Summary:
    case, walk = _denied()
    other = Case()
    read = other.walk()
    return _summary(
        result(went_through(case, walk)),
        result(missing_a(other, other.final["pde"], read), scenario="ad/missing"),
        result(extra_d(other, other.guest["pte"], read), scenario="ad/<b>extra</b>"),
        result(divergence(check="C3", field="cr4", expected=1, observed=2), scenario="state/cr4"),
        result(divergence(check="C4", field="level", rule="context.nested", expected=4, observed=5,
                          events=("  VMRUN", "> run L2", "  #VMEXIT")), scenario="contexts/level"),
        result(divergence(erratum="e1"), scenario="known"),
        Result("gone", lost=MachineLost("it hangs", ["qemu"], "the log's </script> end")),
    )


def test_what_is_told(summary: Summary) -> None:
    """New findings, each with its rule and its values; errata by their own; nothing of the machine is lost."""
    told = html.document(summary)
    assert [one["name"] for one in told["findings"]] == [NAME, "ad/missing", "ad/<b>extra</b>", "state/cr4",
                                                        "contexts/level"]
    assert told["bad"] and told["known"][0]["id"] == "e1" and told["lost"][0]["scenario"] == "gone"
    first = told["findings"][0]
    assert first["rule"][0] == "nested.write" and "15.25" in first["rule"][1]
    assert first["values"][0][1].startswith("#NPF")


def test_the_grid(summary: Summary) -> None:
    """Five rows of four nested entries, four of them with the guest's; the walk stops at the last."""
    grid = html.document(summary)["findings"][0]["grid"]
    assert grid["columns"] == ["pml4e", "pdpte", "pde", "pte"]
    assert [row["label"] for row in grid["rows"]] == ["pml4e", "pdpte", "pde", "pte", "the page"]
    assert [len(row["nested"]) for row in grid["rows"]] == [4] * 5
    assert [row["guest"] is not None for row in grid["rows"]] == [True] * 4 + [False]
    cells = [cell for row in grid["rows"] for cell in [*row["nested"], row["guest"]] if cell]
    assert [cell["last"] for cell in cells].count(True) == 1 and grid["rows"][4]["nested"][3]["last"]
    assert grid["rows"][4]["nested"][3]["first"] and grid["differs"] and "R/W=0" in grid["why"]


def test_an_entry_that_differs(summary: Summary) -> None:
    grid = html.document(summary)["findings"][1]["grid"]
    differing = [cell for row in grid["rows"] for cell in [*row["nested"], row["guest"]] if cell and cell["differs"]]
    assert len(differing) == 1 and int(differing[0]["model"], 16) ^ int(differing[0]["machine"], 16) == 0x20


def test_the_program(summary: Summary) -> None:
    """What L1 and L2 did, up to the finding: it is marked."""
    program = html.document(summary)["findings"][0]["program"]
    assert program == [
        [False, 'op 0  entry = "nested.a.pte"; clear = ["rw"]'], [False, "op 1  VMRUN, L2 at CPL 3"],
        [False, "  probe 0  read a"], [True, "  probe 1  write a+0x8"], [False, "  probe 2  fetch a"],
        [False, "  probe 3  rdcr2"], [False, "  #VMEXIT"]]


def test_it_is_one_page(summary: Summary) -> None:
    """Nothing is fetched, nothing of a finding is markup, and the data is what `document` says."""
    page = html.text(summary)
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    assert "<b>extra" not in page and page.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None and json.loads(data[1]) == json.loads(json.dumps(html.document(summary)))
    assert "{{" not in page.replace(data[1], "")


def test_ten_thousand_findings() -> None:
    """Not every walk is drawn then; of those that are not it is said which they are like."""
    case, walk = _denied()
    finding = went_through(case, walk)
    many = [result(finding, scenario=f"many[{n}]") for n in range(10_000)]
    told = html.document(_summary(*many))["findings"]
    assert len(told) == 10_000 and sum(one["grid"] is not None for one in told) == 500
    assert told[-1]["like"] and len(html.text(_summary(*many))) < 20 << 20


# --- in a browser ---------------------------------------------------------------------------------


def _open(browser: webdriver.Chrome, path: Path, summary: Summary) -> None:
    html.write(path, summary)
    browser.get(path.as_uri())


@needs_browser
def test_in_a_browser(browser: webdriver.Chrome, summary: Summary, tmp_path: Path) -> None:
    """It opens, shows the first walk, filters, goes on by keyboard, explains an entry; and the console stays silent."""
    _open(browser, tmp_path / "page.html", summary)
    assert len(texts(browser, "#list button")) == 5
    assert len(texts(browser, ".grid .cell")) == 24
    assert texts(browser, ".cell.last") != [] and "nested.write" in texts(browser, ".rule")[0]
    field = browser.find_element(By.ID, "filter")
    browser.find_element(By.TAG_NAME, "body").send_keys("/")
    assert browser.switch_to.active_element == field
    field.send_keys("extra")
    assert [text.splitlines()[-1] for text in texts(browser, "#list button")] == [
        "ad/<b>extra</b> · C2 " + html.document(summary)["findings"][2]["field"]]
    field.send_keys(Keys.BACKSPACE * 5 + Keys.ESCAPE)
    sorts = [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#sort option")]
    assert sorts[0] == "all" and len(sorts) == 6 and any(text.startswith("C1 outcome done, rule") for text in sorts)
    Select(browser.find_element(By.ID, "sort")).select_by_index(sorts.index("C4 level, rule context.nested (1)"))
    WebDriverWait(browser, SLOW).until(lambda page: len(texts(page, "#list button")) == 1)
    Select(browser.find_element(By.ID, "sort")).select_by_index(0)
    WebDriverWait(browser, SLOW).until(lambda page: len(texts(page, "#list button")) == 5)
    assert len(texts(browser, "#list button")) == 5
    browser.find_element(By.CSS_SELECTOR, "#list button").send_keys("j")
    assert texts(browser, "#list button[aria-current=true]")[0].splitlines()[-1].startswith("ad/missing")
    browser.find_element(By.CSS_SELECTOR, ".cell.differs").click()
    assert any("1, machine 0" in text for text in texts(browser, "#bits tr"))
    browser.find_elements(By.CSS_SELECTOR, "#list button")[4].click()
    assert texts(browser, ".timeline:not(.program) li.here") == ["run L2"]
    assert complaints(browser) == []


@needs_browser
def test_in_a_browser_at_ten_thousand(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """It opens and filters soon: seconds, with room for a machine that has other things to do."""
    case, walk = _denied()
    finding = went_through(case, walk)
    html.write(tmp_path / "page.html", _summary(*(result(finding, scenario=f"many[{n}]") for n in range(10_000))))
    begun = time.monotonic()
    browser.get((tmp_path / "page.html").as_uri())
    WebDriverWait(browser, 3 * SLOW - (time.monotonic() - begun)).until(
        lambda page: len(page.find_elements(By.CSS_SELECTOR, "#list button")) == 200)
    filtered = browser.execute_script("""
        const begun = performance.now(), field = document.getElementById("filter");
        for (const text of ["many[77", "nothing like it", ""]) {
            field.value = text;
            field.dispatchEvent(new Event("input"));
        }
        return performance.now() - begun;""")
    assert filtered < 3 * 200 * SLOW
    assert texts(browser, "#new-count") == ["10,000"] and len(texts(browser, "#list button")) == 200
    browser.find_element(By.ID, "filter").send_keys("many[9999]")
    assert len(texts(browser, "#list button")) == 1 and "drawn with the first" in texts(browser, "#detail")[0]


@needs_browser
def test_a_matrix_in_a_browser(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Rows, columns and notes are there; a cell explains itself, by keyboard too; no section of a run is in the way."""
    page = tmp_path / "matrix.html"
    page.write_text(matrix.html(MATRIX))
    browser.get(page.as_uri())
    assert texts(browser, "#by-version tr:first-child th") == ["finding", "what", *(c.name for c in MATRIX.columns)]
    assert texts(browser, "#by-version th.r") == MATRIX.rows()
    assert not browser.find_element(By.ID, "new").is_displayed() and "none" in texts(browser, "#notes")[0]
    browser.find_element(By.CSS_SELECTOR, "#by-version .stale").send_keys(Keys.ENTER)
    assert texts(browser, "#cell")[0].startswith("e1 on Q3: absent. ")
    assert complaints(browser) == []


@needs_browser
def test_tables_and_the_program_in_a_browser(browser: webdriver.Chrome, summary: Summary, tmp_path: Path) -> None:
    exits = html.Table("Exits", ("exit code", "seen"), (("VMEXIT_NPF", "7"),))
    html.write(tmp_path / "page.html", summary, tables=[exits])
    browser.get((tmp_path / "page.html").as_uri())
    assert texts(browser, "#tables h2") == ["Exits"] and "VMEXIT_NPF 7" in texts(browser, "#tables table")[0]
    assert texts(browser, ".program li.here")[0].split() == ["probe", "1", "write", "a+0x8"]


@needs_browser
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_it_can_be_read(scheme: str, browser: webdriver.Chrome, summary: Summary, tmp_path: Path) -> None:
    html.write(tmp_path / "page.html", summary)
    assert unreadable(browser, scheme, (tmp_path / "page.html").as_uri()) == []


@needs_browser
def test_coverage_in_a_browser(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """A rule a row; dimensions in the order of a walk, each above its levels from the root; a cell says what it is."""
    identity = Identity(features=("nx", "page1g", *FEATURES))
    cells = [one for one in universe(Cpu(40, True, 16, frozenset(identity.features))).reachable
             if one.rule == "guest.present" and one.level == "pde"]
    made = summarize(identity, [SCENARIO], [result()], [], 1.0, cells=cells)
    told = html.document(made)["coverage"]
    dimensions = [dimension for dimension, _ in told["columns"]]
    assert list(dict.fromkeys(dimensions)) == ["", "guest", "nested table", "nested page", "both"]
    assert [level for dimension, level in told["columns"] if dimension == "guest" and level][:3] == [
        "pml5e", "pml4e", "pdpte"] and dimensions.count("both") == 1
    html.write(tmp_path / "page.html", made)
    browser.get((tmp_path / "page.html").as_uri())
    spans = [(one.text, int(one.get_attribute("colspan") or 1))
             for one in browser.find_elements(By.CSS_SELECTOR, ".heat tr:first-child th")[1:]]
    assert spans == [(dimension or "no walk", dimensions.count(dimension)) for dimension in dict.fromkeys(dimensions)]
    filled = [one.get_attribute("title") for one in browser.find_elements(By.CSS_SELECTOR, ".heat td[title]")
              if not (one.text or "0/").startswith("0/")]
    assert filled == [f"guest.present, guest pde: {len(cells)} of {len(cells)} cells reached"]
    assert complaints(browser) == []
