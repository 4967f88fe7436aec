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
from harness.lockstep.tally import Tally
from harness.model.entries import RW
from harness.report.styled import line, plain
from harness.report.terminal import DRAWN, KINDS, NAMED, Screen, Watch, show, table
from tests.model.tables import WRITE
from tests.report.cases import NAME, SCENARIO, Case, divergence, erratum, result, went_through
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
        with Watch(self.scenarios(200), screen=Screen(log)) as watch:
            for n in range(200):
                watch.result(result(divergence(erratum="e1"), scenario=f"s{n}"))
        lines = log.getvalue().splitlines()
        assert lines[0] == "checking 200 scenarios"
        assert len(lines) == 11 and lines[1].startswith("20 of 200 scenarios, divergences: 0 new, 20 known, ")
        assert lines[10].startswith("200 of 200 scenarios")

    def test_lines_when_it_takes_long(self, log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [100.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        with Watch(self.scenarios(20), screen=Screen(log)) as watch:
            for n in range(20):
                now[0] += 4
                watch.result(result(scenario=f"s{n}"))
        assert [one.split()[0] for one in log.getvalue().splitlines()[1:]] == ["3", "6", "9", "12", "15", "18"]

    def test_a_finding_is_drawn(self, log: io.StringIO) -> None:
        with Watch([SCENARIO], screen=Screen(log)) as watch:
            watch.result(result(wrong(), divergence(probe=2, field="value", expected=1, observed=2)))
        text = log.getvalue()
        assert f"{NAME}: `write a+0x8` went through; it must end in #NPF.\n" in text
        assert "nested walk of gPA" in text and "  > outcome" not in text and "  and 1 more in this scenario" in text

    def test_known_ones_are_not(self, log: io.StringIO) -> None:
        with Watch([SCENARIO], screen=Screen(log)) as watch:
            watch.result(result(wrong().explained_by("e1")))
        assert log.getvalue() == "checking 1 scenarios\n"

    def test_known_ones_are_with_strict(self, log: io.StringIO) -> None:
        with Watch([SCENARIO], strict=True, screen=Screen(log)) as watch:
            watch.result(result(wrong().explained_by("e1")))
        assert "went through" in log.getvalue() and "(known: e1)" in log.getvalue()

    def test_one_of_a_sort_is_drawn_others_are_named(self, log: io.StringIO) -> None:
        count = NAMED + 10
        with Watch(self.scenarios(count), screen=Screen(log)) as watch:
            for n in range(count):
                watch.result(result(wrong(), scenario=f"s{n}"))
        text = log.getvalue()
        assert text.count("nested walk of gPA") == 5  # of one finding
        assert sum(one.endswith("it must end in #NPF.") for one in text.splitlines()) == 1 + NAMED
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
        assert "went through" in text and "scenarios, divergences:" not in text
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


class TestTable:
    def text(self, width: int = 100, **values: Any) -> str:
        return plain(table(summary(**values), width))

    def test_totals(self) -> None:
        rows = dict(re.findall(r"^  (\S.*?)  +([\d,.]+(?: of \d+)?)$", self.text(), re.M))
        assert rows == {
            "scenarios": "2 of 3", "VMRUNs checked": "6", "probes checked": "24", "table bytes compared": "8,192",
            "divergences: new": "2", "divergences: known": "3", "seconds": "2.50",
        }

    def test_machine(self) -> None:
        assert self.text().startswith("machine  tcg: QEMU 7.2.22 (/usr/bin/qemu-system-x86_64), CPU max,")
        assert self.text(identity=None).startswith("machine  the machine never came up")

    def test_known_errata(self) -> None:
        listed = [erratum("e1", since=(7, 2), until=(10, 0), explanation="It is\nso."), erratum("e2", machine="kvm")]
        text = self.text(errata=listed)
        assert "       3  e1  in 2 scenarios; qemu-tcg 7.2 to 10.0\n" in text
        assert "       1  e2  in 1 scenario; kvm\n" in text and "\nKnown errata\n" in text
        assert "          title of e1\n          It is so.\n          see the manual\n" in text
        assert "qemu-tcg from 7.2 on" in self.text(errata=[erratum("e1", since=(7, 2))])
        assert "qemu-tcg up to 7.2" in self.text(errata=[erratum("e1", until=(7, 2))])

    def test_no_errata(self) -> None:
        assert "errata" not in self.text(results=[result()])

    def test_strict(self) -> None:
        assert "Known errata (counted as new: --strict)" in self.text(strict=True)

    def test_what_differs(self) -> None:
        known = result(divergence(erratum="e"))
        text = self.text(results=[result(wrong()), result(wrong(), wrong(), scenario="other"), known])
        flat = " ".join(text.split())
        assert f"2 L2 went through; it must end in #NPF. (rule nested.write); first in {NAME}" in flat
        assert "What differs" not in self.text(results=[known])

    def test_what_differs_has_an_end(self) -> None:
        many = [divergence(probe=n, field="value", expected=1, observed=2, rule=f"r{n}") for n in range(KINDS + 3)]
        text = self.text(results=[result(*many)])
        assert text.count("(rule r") == KINDS and "       3  of other sorts" in text

    def test_lost_machines(self) -> None:
        lost = MachineLost("QEMU exited with status 1", ["qemu", "-S"], "last words\x1b[2J\n", "#7 ENTER, probe 0")
        text = self.text(results=[result(lost=lost)])
        assert f"Lost machines\n  {NAME}\n    machine lost: QEMU exited with status 1\n" in text
        assert "    last record: #7 ENTER, probe 0\n" in text and "        last words\n" in text
        assert "    it was started as: qemu -S\n" in text and "\x1b" not in text

    @pytest.mark.parametrize(
        ("values", "verdict"),
        [
            ({}, "2 new divergences in 1 of 2 scenarios"),
            ({"results": [result(divergence())]}, "1 new divergence in 1 of 1 scenarios"),
            ({"results": [result(divergence(), lost=MachineLost("gone"))]},
             "1 new divergence in 1 of 1 scenarios, and the machine was lost"),
            ({"results": [result(lost=MachineLost("gone"))]}, "no new divergence, but the machine was lost"),
            ({"results": [result(divergence(erratum="e1"))]}, "no new divergence, but not all scenarios were run"),
            ({"results": [result()], "scenarios": [SCENARIO], "sweeps": [Tally("sweeps/x", total=9, asked=3, done=2)]},
             "no new divergence, but not all scenarios were run"),
            ({"results": [result(divergence(erratum="e1"))], "scenarios": [SCENARIO]}, "agreed, but for known errata"),
            ({"results": [result(divergence(erratum="e1"))], "scenarios": [SCENARIO], "strict": True},
             "1 new divergence in 1 of 1 scenarios"),
            ({"results": [result()], "scenarios": [SCENARIO]}, "agreed"),
        ],
    )
    def test_verdict(self, values: dict[str, Any], verdict: str) -> None:
        assert self.text(**values).splitlines()[-1] == verdict

    @pytest.mark.parametrize("width", [80, 100, 120])
    def test_width(self, width: int) -> None:
        long = erratum("e1", title="word " * 40, explanation="word " * 90, reference="word " * 50)
        assert max(map(len, self.text(width, errata=[long]).splitlines())) <= width

    def test_show(self, log: io.StringIO) -> None:
        show(summary(), Screen(log))
        assert log.getvalue().endswith("2 new divergences in 1 of 2 scenarios\n")
