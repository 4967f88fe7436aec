"""The timeline of a run: what it says of each visit of L2, and what a browser makes of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from harness.errors import MachineLost
from harness.lockstep.result import Result, Switch, Told, Under, Visit
from harness.model.memory import Memory
from harness.model.registers import CR0, CR4, EFER
from harness.model.vmcb import NP_ENABLE, ExitCode, Vmcb
from harness.model.vmrun import Host
from harness.report import html, timeline
from harness.report.summary import Summary, summarize
from harness.report.timeline import Timeline
from harness.wire.layout import VMRUN_RAISED
from tests.report.browser import SLOW, complaints, needs_browser, texts, unreadable
from tests.report.cases import NAME, SCENARIO, divergence, erratum

NESTED = Under(4, 0x1000, 4)
PLAIN = Under(0, 0, 3)
DONE = Visit(1, 4, ExitCode.VMMCALL, 0, 0, NESTED)


def visits() -> list[Visit]:
    """One scenario's: a fault at probe 1, all done behind it, then a VMRUN that is refused, and one that raises #GP."""
    return [Visit(1, 1, ExitCode.NPF, 0x1_0000_0007, 0x5000, NESTED), DONE,
            Visit(3, 0, ExitCode.INVALID, 0, 0, PLAIN), Visit(4, 0, VMRUN_RAISED | 13, 0, 0, PLAIN)]


def result(*found: Any, name: str = NAME, **more: Any) -> Result:
    return Result(name, 4, divergences=[one._replace(scenario=name) for one in found], visits=visits(), **more)


def notes(document: dict[str, Any]) -> list[str]:
    return [document["notes"][number][1] for number in document["note"]]


def test_what_is_asked_for() -> None:
    """Nested paging, its nCR3, and the levels of either table; the format of the nested one is L1's mode."""
    vmcb = Vmcb(Memory.over(memoryview(bytearray(0x1000))), 0)
    long = Host(CR0.PG | CR0.PE, CR4.PAE, EFER.LMA | EFER.LME, 0, 0)
    assert Under.of(vmcb, long) == Under(0, 0, 0)
    vmcb["ncr3"], vmcb["cr0"] = 0x7000, CR0.PG
    assert Under.of(vmcb, long) == Under(0, 0, 2)
    vmcb["np_control"], vmcb["cr4"] = NP_ENABLE, CR4.PAE
    assert Under.of(vmcb, long) == Under(4, 0x7000, 3)
    vmcb["efer"] = EFER.LMA | EFER.LME
    assert Under.of(vmcb, Host(CR0.PG | CR0.PE, 0, 0, 0, 0)) == Under(2, 0x7000, 4)
    vmcb["cr4"] = CR4.PAE | CR4.LA57
    assert Under.of(vmcb, Host(CR0.PG | CR0.PE, CR4.PAE | CR4.LA57, EFER.LMA, 0, 0)) == Under(5, 0x7000, 5)


def test_each_visit() -> None:
    told = timeline.of_results([result(), result(name="other")]).document()
    assert told["programs"] == [(NAME, 4), ("other", 4)] and told["op"] == [1, 1, 3, 4] * 2
    said = [told["exits"][number] for number in told["exit"][:4]]
    assert said == [("npf", "VMEXIT_NPF P|W|U|FINAL"), ("done", "VMEXIT_VMMCALL"),
                    ("refused", "VMRUN refused: VMEXIT_INVALID"), ("refused", "exception 13 of VMRUN, in L1")]
    assert told["at"][:2] == ["5000", ""] and [told["unders"][number] for number in told["under"][1:3]] == [
        "nCR3 1000, 4-level; L2 4-level", "not nested; L2 PAE"]
    assert len(told["exits"]) == 4 and notes(told) == [""] * 8 and told["left_out"] == 0
    assert told["about"] == "" and told["contexts"] == [] and told["switch"] == [0] * 8


MAP = Told(True, "L1 root_mmu direct, root level 5 at 0x5000 efer_nx cr0_wp")
SHADOW, ANOTHER = (Told(False, f"L2 guest_mmu shadow of 0x1000 (4 levels), root level 5 at {at:#x} efer_nx")
                   for at in (0x6000, 0x9000))
SWITCHES = [Switch(None, (SHADOW,), MAP, 1), Switch(MAP, (SHADOW, ANOTHER, MAP, ANOTHER), MAP, 5), None,
            Switch(MAP, (), SHADOW, 0)]


def test_contexts() -> None:
    """In order, by number; an unknown one is -1, and a VMRUN of which KVM told nothing has the empty list. Those that
    belong to no visit are left out."""
    told = timeline.of_results([result(switches=[*SWITCHES, SWITCHES[0]]), result(switches=SWITCHES[:1])]).document()
    assert told["contexts"] == [("shadow", SHADOW.words), ("direct", MAP.words), ("shadow", ANOTHER.words)]
    assert [told["switches"][number] for number in told["switch"]] == [
        (-1, 0, 1), (1, 0, 2, 1, 2, 1), (), (1, 0), (-1, 0, 1), (), (), ()]
    assert told["entries"] == [1, 5, 0, 0, 1, 0, 0, 0] and "shadow" in told["about"]


@pytest.mark.parametrize(("op", "probe", "at"), [
    (1, 0, 0), (1, 1, 0), (1, 2, 1), (1, -1, 1), (3, 0, 2), (4, -1, 3), (-1, -1, 3), (7, 0, 3)])
def test_where_a_finding_is(op: int, probe: int, at: int) -> None:
    """In the visit in which the probe was made; the op's last where it is of none."""
    told = timeline.of_results([result(divergence(op=op, probe=probe, check="C3", field="cr4"))]).document()
    assert [n for n, note in enumerate(notes(told)) if note] == [at] and notes(told)[at] == "new: C3 cr4"


def test_known_and_new() -> None:
    """What is new is told before what is known, by the same names as elsewhere; --strict takes all for new."""
    known, new = (divergence(op=1, probe=0, field=name, erratum=by) for name, by in (("a", "e1+e2"), ("b", None)))
    for strict, found, want in ((False, [known], "known: e1, e2"), (False, [known, new], f"new: {new.check} b"),
                                (True, [known], f"new: {known.check} a")):
        told = timeline.of_results([result(*found)], strict).document()
        assert notes(told)[0] == want and not any(notes(told)[1:])


def test_a_lost_machine() -> None:
    """There is no #VMEXIT for it: a row of its own."""
    told = timeline.of_results([result(lost=MachineLost("it hangs"))]).document()
    assert told["programs"] == [(NAME, 5)] and told["op"][-1] == -1 and notes(told)[-1] == "lost: it hangs"


def test_no_more_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the limit only what is new, and not without end; how many are left out is said."""
    monkeypatch.setattr(timeline, "LIMIT", 8)
    new = divergence(op=1, probe=0)
    told = timeline.of_results([result(*found, name=name) for name, found in (
        ("a", []), ("b", []), ("c", []), ("d", [new]), ("e", [new]), ("f", [new]))]).document()
    assert [name for name, _ in told["programs"]] == ["a", "b", "d", "e"] and told["left_out"] == 8


# --- in a browser ---------------------------------------------------------------------------------


def page(path: Path, summary: Summary, of: Timeline) -> str:
    html.write(path, summary, timeline=of)
    return path.as_uri()


def summary(*results: Result) -> Summary:
    return summarize(None, [SCENARIO], results, [erratum()], 1.0)


@pytest.fixture
def url(tmp_path: Path) -> str:
    results = [result(name="quiet"), result(divergence(op=1, probe=2, field="cr4"), name="loud"),
               result(divergence(op=1, probe=2, erratum="e1"), name="usual")]
    return page(tmp_path / "page.html", summary(*results), timeline.of_results(results))


def _press(box: Any, key: str) -> None:
    box.send_keys(key)


@needs_browser
def test_by_keyboard(browser: webdriver.Chrome, url: str) -> None:
    """Rows, the marked one, to the next finding and to it; and the console stays silent."""
    browser.get(url)
    box = browser.find_element(By.ID, "visits")

    def here() -> list[str]:
        return texts(browser, "#visits .here span")

    assert len(texts(browser, "#visits > div")) == 12 and here()[:3] == ["1", "quiet", "op 1"]
    _press(box, Keys.ARROW_DOWN)
    assert here()[0] == "2" and box.get_attribute("aria-activedescendant") == "visit-1"
    _press(box, "c")
    assert here()[0] == "3" and here()[3] == "◆ not nested; L2 PAE"
    _press(box, "n")
    assert here()[0] == "6" and here()[5].startswith("new: ") and "cr4" in here()[5]
    assert browser.switch_to.active_element == box
    _press(box, Keys.ENTER)
    assert texts(browser, "#list small") == ["loud · C1 cr4"] and "cr4" in texts(browser, "#detail")[0]
    assert browser.switch_to.active_element == browser.find_element(By.ID, "detail")
    _press(box, Keys.END)
    assert here()[0] == "12"
    browser.find_element(By.CSS_SELECTOR, "#detail .go").click()
    assert here()[0] == "6"
    assert complaints(browser) == []


@needs_browser
def test_contexts_in_words(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """The chain of each VMRUN in its row, all of it below; c goes to where it changes, and the filter knows it."""
    one = result(switches=SWITCHES)
    browser.get(page(tmp_path / "page.html", summary(one), timeline.of_results([one])))
    assert [row.split("\n")[4:5] for row in texts(browser, "#visits > div")] == [
        ["? → shadow → direct"], ["direct → shadow, direct, shadow → direct"], ["VMRUN refused: VMEXIT_INVALID"],
        ["direct → none → shadow"]]
    box = browser.find_element(By.ID, "visits")
    assert texts(browser, "#passed li")[0] == "L1: not traced"
    _press(box, "c")
    assert texts(browser, "#passed li") == [
        MAP.words, "VMRUN    nCR3 1000, 4-level; L2 4-level; 5 entries of the processor into L2",
        SHADOW.words, ANOTHER.words, MAP.words, ANOTHER.words, "#VMEXIT  VMEXIT_VMMCALL", MAP.words]
    _press(box, "c")
    assert texts(browser, "#passed li") == ["VMRUN    not nested; L2 PAE: KVM refused it, or told nothing"]
    browser.find_element(By.ID, "visit-filter").send_keys("none")
    assert len(texts(browser, "#visits > div")) == 1 and texts(browser, "#passed li")[-1] == SHADOW.words
    assert complaints(browser) == []


@needs_browser
def test_filters(browser: webdriver.Chrome, url: str) -> None:
    browser.get(url)
    field = browser.find_element(By.ID, "visit-filter")
    field.send_keys("invalid quiet")
    assert [text.split()[0] for text in texts(browser, "#visits > div")] == ["3"]
    assert texts(browser, "#visit-count") == ["1 of 12"]
    field.clear()
    field.send_keys("5000")
    assert len(texts(browser, "#visits > div")) == 3
    field.send_keys("x")
    assert texts(browser, "#visits") == ["Nothing matches."]
    field.clear()
    field.send_keys(" ")
    for index, count in ((1, 2), (2, 1), (0, 12)):
        Select(browser.find_element(By.ID, "found")).select_by_index(index)
        assert len(texts(browser, "#visits > div")) == count
    assert complaints(browser) == []


@needs_browser
def test_the_strip(browser: webdriver.Chrome, url: str) -> None:
    """It has ink, and a click on it goes there."""
    browser.get(url)
    strip = browser.find_element(By.ID, "strip")
    inked = """const at = strip.getContext("2d").getImageData(0, 0, strip.width, strip.height).data;
        return at.filter((value, n) => n % 4 === 3 && value).length / strip.width / strip.height;"""
    assert browser.execute_script(f"const strip = arguments[0]; {inked}", strip) > .5
    right = strip.size["width"] // 2 - 5
    webdriver.ActionChains(browser).move_to_element_with_offset(strip, right, 0).click().perform()
    assert texts(browser, "#visits .here span")[0] == "12"


@needs_browser
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_it_can_be_read(scheme: str, browser: webdriver.Chrome, url: str) -> None:
    assert unreadable(browser, scheme, url) == []


@needs_browser
def test_a_whole_run_in_a_browser(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """60,000 VMRUNs and 10,000 findings: it opens in seconds, and each key and filter is answered at once, with room
    for a machine that has other things to do."""
    found = divergence(op=1, probe=2, check="C3", field="cr4")
    tables = [Told(False, f"L2 guest_mmu shadow of {n << 12:#x} (4 levels), root {n:x}") for n in range(4000)]
    many = [result(*([found] if n < 10_000 else []), name=f"many[{n}]",
                   switches=[Switch(MAP, (tables[n % 4000],), MAP, 7), *SWITCHES[1:]]) for n in range(15_000)]
    of = timeline.of_results(many)
    url = page(tmp_path / "page.html", summary(*many), of)
    assert (tmp_path / "page.html").stat().st_size < 20 << 20
    begun = time.monotonic()
    browser.get(url)
    WebDriverWait(browser, 3 * SLOW - (time.monotonic() - begun)).until(
        lambda page: texts(page, "#visit-count") == ["60,000"])
    taken = browser.execute_script("""
        const begun = performance.now(), field = document.getElementById("visit-filter");
        for (const text of ["many[77", "npf", ""]) {
            field.value = text;
            field.dispatchEvent(new Event("input"));
        }
        const sifted = performance.now(), box = document.getElementById("visits");
        for (const key of ["End", "Home", "n", "n", "PageDown", "c"])
            box.dispatchEvent(new KeyboardEvent("keydown", {key}));
        return [(sifted - begun) / 3, (performance.now() - sifted) / 6];""")
    assert taken[0] < 200 * SLOW and taken[1] < 50 * SLOW
    assert len(texts(browser, "#visits > div")) == 24 and complaints(browser) == []
