"""Progress and the table at the end: on a terminal, and in a log."""

from __future__ import annotations

import io
import os
import re
import time
from dataclasses import replace
from typing import Any

import pytest

from harness.errors import MachineLost
from harness.lockstep.compare import Divergence
from harness.model.entries import RW
from harness.report.styled import line, plain
from harness.report.table import table
from harness.report.terminal import DRAWN, NAMED, Screen, Volume, Watch
from tests.model.tables import WRITE
from tests.report.cases import NAME, SCENARIO, Case, divergence, result, went_through
from tests.report.test_summary import summary

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setenv("COLUMNS", "100")
    return io.StringIO()


@pytest.fixture
def tty(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def wrong(case: Case | None = None) -> Divergence:
    """A write that went through."""
    case = case or Case()
    case.space.change(case.final["pte"], clear=RW)
    return went_through(case, case.walk(WRITE, 8))


class TestScreen:
    def test_a_log_has_no_escapes(self, log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        screen = Screen(log)
        screen.show(table(summary(), 100))
        assert not screen.terminal and "\x1b" not in log.getvalue()
        assert log.getvalue() == plain(table(summary(), 100)) + "\n"

    def test_colour_on_a_terminal(self, tty: Terminal) -> None:
        Screen(tty).show(table(summary(), 100))
        assert COLOUR.search(tty.getvalue())
        assert COLOUR.sub("", tty.getvalue()).split() == plain(table(summary(), 100)).split()

    @pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
    def test_no_colour(self, tty: Terminal, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
        monkeypatch.setenv(name, value)
        Screen(tty).show(table(summary(), 100))
        assert not COLOUR.search(tty.getvalue())
        assert tty.getvalue().split() == plain(table(summary(), 100)).split()

    def test_an_empty_no_color_is_none(self, tty: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NO_COLOR", "")
        assert Screen(tty).colour

    @pytest.mark.parametrize(("columns", "width"), [("40", 80), ("97", 97), ("250", 120)])
    def test_width(self, tty: Terminal, monkeypatch: pytest.MonkeyPatch, columns: str, width: int) -> None:
        monkeypatch.setenv("COLUMNS", columns)
        assert Screen(tty).width == width

    def test_long_lines_are_not_cut(self, tty: Terminal) -> None:
        Screen(tty).show([line("x" * 300)])
        assert "x" * 300 in tty.getvalue()

    def test_a_reader_that_has_seen_enough(self) -> None:
        """`twinwalk run | head`: the run goes on to its end, and to its result files."""
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w", encoding="utf-8") as pipe:
            screen = Screen(pipe)
            screen.show([line("one")])
            screen.show([line("two")])

    @pytest.mark.parametrize("tty", [False, True])
    def test_any_encoding_will_do(self, tty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm")
        out = io.BytesIO()
        stream = io.TextIOWrapper(out, encoding="ascii")
        monkeypatch.setattr(stream, "isatty", lambda: tty)
        screen = Screen(stream)
        screen.show([line("gr\u00fc\u00df")])
        stream.flush()
        assert screen.terminal is tty and b"gr\\xfc\\xdf" in out.getvalue()

    def test_nothing(self, log: io.StringIO, tty: Terminal) -> None:
        Screen(log).show([])
        Screen(tty).show([])
        assert log.getvalue() == tty.getvalue() == ""


class TestWatch:
    def scenarios(self, count: int) -> list[Any]:
        return [replace(SCENARIO, name=f"s{n}") for n in range(count)]

    def test_lines_in_a_log(self, log: io.StringIO) -> None:
        """One for each folder, when it is done; what is not done at the end is told then."""
        names = [f"{folder}/s[{n}]" for folder in ("ad", "walk", "vmrun") for n in range(50)] + ["first-light"]
        with Watch([replace(SCENARIO, name=name) for name in names], screen=Screen(log), cases=30) as watch:
            for n, name in enumerate(names[:120]):
                if n == 99:
                    before = log.getvalue()
                watch.result(result(*[divergence(erratum="e1")] * (n < 50), scenario=name))
            watch.result(result(scenario="first-light", skipped="it lacks something"))
            for n in range(30):
                watch.result(result(scenario=f"sweeps/x[{n}]", lost=MachineLost("gone") if n == 7 else None))
        lines = [" ".join(re.sub(r"[\d.]+ s  ", "", one).split()) for one in log.getvalue().splitlines()[:-1]]
        assert lines == [
            "checking 151 scenarios and 30 cases of sweeps", "ad 50 scenarios 150 VMRUNs 50 known",
            "walk 50 scenarios 150 VMRUNs agreed", "first-light 1 scenario 3 VMRUNs 1 skipped",
            "sweeps/x[7]: the machine was lost: gone",
            "sweeps 30 cases 90 VMRUNs 1 times lost", "vmrun 20 of 50 scenarios 60 VMRUNs agreed"]
        assert before.count("\n") == 2, "they come as the run goes"

    def test_files_of_ones_own_are_one_family(self, log: io.StringIO) -> None:
        with Watch(self.scenarios(200), screen=Screen(log)) as watch:
            for n in range(200):
                watch.result(result(scenario=f"s{n}"))
        assert [one.split()[:3] for one in log.getvalue().splitlines()[1:-1]] == [["others", "200", "scenarios"]]

    def test_quiet(self, log: io.StringIO, tty: Terminal) -> None:
        """A line for each finding, on a terminal too, and not a word of what agrees."""
        for stream in (log, tty):
            with Watch(self.scenarios(3), screen=Screen(stream, Volume.QUIET)) as watch:
                watch.result(result(scenario="s0"))
                watch.result(result(wrong(), scenario="s1"))
            assert " ".join(COLOUR.sub("", stream.getvalue()).split()) == "s1: " + (
                "The machine let L2 write sPA 0x654008: the nested pte for the page itself has R/W=0; manual 15.25.7.")

    def test_a_finding_fits_the_screen(self, tty: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
        """At 80 by 24 both walks are there with what matters, and at --verbose all of it."""
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("LINES", "24")
        heights = {}
        for volume in (Volume.NORMAL, Volume.VERBOSE):
            stream = Terminal()
            screen = Screen(stream, volume)
            with Watch([SCENARIO], screen=screen) as watch:
                watch.result(result(wrong()))
            text = COLOUR.sub("", stream.getvalue())
            heights[volume] = len(text[: text.rindex("outcome")].splitlines()) + 3
            assert "  >   pte" in text and "guest pml4e" in text and "! outcome" in text
            assert ("16 nested entries, of walks in which nothing differs" in text) is (volume < Volume.VERBOSE)
        assert heights[Volume.NORMAL] <= 24 < heights[Volume.VERBOSE]

    def test_lines_when_it_takes_long(self, log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [100.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        with Watch(self.scenarios(20), screen=Screen(log)) as watch:
            for n in range(20):
                now[0] += 8
                watch.result(result(scenario=f"s{n}"))
        lines = log.getvalue().splitlines()
        assert [one.split()[0] for one in lines[1:-1]] == ["3", "6", "9", "12", "15", "18", "others"]
        assert lines[1] == "3 of 20 scenarios, divergences: 0 new, 0 known, 0/s, 24 s, 2 min left"

    def test_a_finding_is_drawn(self, log: io.StringIO) -> None:
        with Watch([SCENARIO], screen=Screen(log)) as watch:
            watch.result(result(wrong(), divergence(probe=2, field="value", expected=1, observed=2)))
        text = log.getvalue()
        assert f"{NAME}: The machine let L2 write sPA 0x654008: the nested pte for the page itself has" in text
        assert "nested walk of gPA" in text and "  > outcome" not in text and "  and 1 more in this scenario" in text

    def test_known_ones_are_not(self, log: io.StringIO) -> None:
        with Watch([SCENARIO], screen=Screen(log)) as watch:
            watch.result(result(wrong().explained_by("e1")))
        assert len(log.getvalue().splitlines()) == 3 and "1 known" in log.getvalue()

    def test_known_ones_are_with_strict(self, log: io.StringIO) -> None:
        with Watch([SCENARIO], strict=True, screen=Screen(log)) as watch:
            watch.result(result(wrong().explained_by("e1")))
        assert "The machine let L2 write" in log.getvalue() and "(known: e1)" in log.getvalue()

    def test_one_of_a_sort_is_drawn_others_are_named(self, log: io.StringIO) -> None:
        count = NAMED + 10
        with Watch(self.scenarios(count), screen=Screen(log)) as watch:
            for n in range(count):
                watch.result(result(wrong(), scenario=f"s{n}"))
        text = log.getvalue()
        assert text.count("nested walk of gPA") == 5  # of one finding
        assert text.count("The machine let L2 write") == 1 + NAMED
        assert text.count("More scenarios differ.") == 1

    def test_not_too_many_are_drawn(self, log: io.StringIO) -> None:
        with Watch(self.scenarios(20), screen=Screen(log)) as watch:
            for n in range(20):
                one = divergence(Case().walk(), field="value", expected=1, observed=2, rule=f"r{n}")
                watch.result(result(one, scenario=f"s{n}"))
        assert log.getvalue().count("  > outcome") == DRAWN

    def test_a_lost_machine(self, log: io.StringIO) -> None:
        with Watch([SCENARIO], screen=Screen(log)) as watch:
            watch.result(result(lost=MachineLost("QEMU \x1b[31mexited")))
        assert f"{NAME}: the machine was lost: QEMU exited\n" in log.getvalue()

    def test_bar_on_a_terminal(self, tty: Terminal) -> None:
        with Watch(self.scenarios(4), screen=Screen(tty)) as watch:
            watch.result(result(divergence(erratum="e1"), scenario="s0"))
            watch.result(result(wrong(), scenario="s1"))
        text = COLOUR.sub("", tty.getvalue())
        assert "checking" in text and "2/4" in text and "1 new, 1 known" in text
        assert "The machine let L2 write" in text and "scenarios, divergences:" not in text
        assert re.search(r"[\d,]+/s 0:\d\d:\d\d left [-\d]", text), "rate, time gone, time left"

    def test_no_time_is_left_where_nobody_knows(self, tty: Terminal) -> None:
        with Watch([], screen=Screen(tty)) as watch:
            watch.result(result())
        text = COLOUR.sub("", tty.getvalue())
        assert "/s" in text and "left" not in text

    def test_the_bar_ends_with_an_exception(self, tty: Terminal) -> None:
        """Ctrl-C must not leave a terminal without a cursor."""
        def interrupted(watch: Watch) -> None:
            watch.result(result())
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), Watch(self.scenarios(4), screen=Screen(tty)) as watch:
            interrupted(watch)
        assert tty.getvalue().rindex("\x1b[?25h") > tty.getvalue().rindex("\x1b[?25l")
