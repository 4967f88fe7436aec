"""What a run came to, at its end."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from harness.errors import MachineLost
from harness.lockstep.tally import Tally
from harness.report.styled import plain
from harness.report.table import ERRATA, KINDS, show, table
from harness.report.terminal import Screen, Volume
from tests.report.cases import NAME, SCENARIO, divergence, erratum, result
from tests.report.test_summary import summary
from tests.report.test_terminal import wrong


class TestTable:
    def text(self, width: int = 100, volume: Volume = Volume.NORMAL, **values: Any) -> str:
        return plain(table(summary(**values), width, volume=volume))

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
        text = self.text(errata=listed, volume=Volume.VERBOSE)
        assert "       3  e1  in 2 scenarios; qemu-tcg 7.2 to 10.0\n" in text
        assert "       1  e2  in 1 scenario; kvm\n" in text and "\nKnown errata\n" in text
        assert "          title of e1\n          It is so.\n          see the manual\n" in text
        for values, said in (({"since": (7, 2)}, "qemu-tcg from 7.2 on"), ({"until": (7, 2)}, "qemu-tcg up to 7.2")):
            assert said in self.text(errata=[erratum("e1", **values)], volume=Volume.VERBOSE)

    def test_known_errata_in_a_line_each(self) -> None:
        """The most frequent ones, and how many others there are: the verdict must be in sight."""
        ids = [f"e{n}" for n in range(ERRATA + 5)]
        results = [result(*(divergence(erratum=name) for n, name in enumerate(ids) for _ in range(20 - n)))]
        text = self.text(errata=[erratum(name, explanation="It is so.") for name in ids], results=results)
        assert "      20  e0: title of e0\n" in text and "It is so" not in text and "title of e12" not in text
        assert f"      {sum(20 - n for n in range(ERRATA, ERRATA + 5))}  of 5 others\n" in text

    def test_no_errata(self) -> None:
        assert "errata" not in self.text(results=[result()])

    def test_strict(self) -> None:
        assert "Known errata (counted as new: --strict)" in self.text(strict=True)

    def test_what_differs(self) -> None:
        known = result(divergence(erratum="e"))
        text = self.text(results=[result(wrong()), result(wrong(), wrong(), scenario="other"), known])
        flat = " ".join(text.split())
        said = "The machine let L2 write sPA ...: the nested pte for the page itself has R/W=0 (rule nested.write)"
        assert f"2 {said}; first in {NAME}" in flat
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

    def test_quiet(self) -> None:
        """The verdict alone; what is new was said as it was found."""
        assert self.text(volume=Volume.QUIET) == "2 new divergences in 1 of 2 scenarios"

    def test_old_translations_by_family_are_for_those_who_ask(self) -> None:
        results = [result(stale_permitted=7, stale_seen=2, scenario="flush/x[1]")]
        assert "Old translations" not in self.text(results=results)
        assert re.search(r"^  old translations seen +2 of 7 permitted$", self.text(results=results), re.M)
        assert "  flush/x" in self.text(results=results, volume=Volume.VERBOSE)

    @pytest.mark.parametrize("volume", Volume)
    def test_show(self, volume: Volume) -> None:
        log = io.StringIO()
        show(summary(), Screen(log, volume))
        assert log.getvalue().endswith("2 new divergences in 1 of 2 scenarios\n")
