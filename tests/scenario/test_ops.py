"""Probes as text, and changes of values by bit names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.scenario.ops import MEMORY, PORTS, REPEATED, SIZED, STEPPED, STORES, Change, Probe, parse_probe
from harness.wire.layout import PROBES


@pytest.mark.parametrize(
    ("text", "probe"),
    [
        ("read a", Probe("read", "a")),
        ("  read   a  ", Probe("read", "a")),
        ("read1 b", Probe("read", "b", 0, 1)),
        ("read2 c+0x10", Probe("read", "c", 16, 2)),
        ("write4 a+8 = 0x1234", Probe("write", "a", 8, 4, 0x1234)),
        ("write8 a=1", Probe("write", "a", 0, 8, 1)),
        ("write a", Probe("write", "a")),
        ("rmw d+4088 = 0b101", Probe("rmw", "d", 4088, 0, 5)),
        ("fetch a+0x20", Probe("fetch", "a", 32)),
        ("read 0xffff_8000_0000_0000", Probe("read", "0xffff_8000_0000_0000")),
        ("invlpg b", Probe("invlpg", "b")),
        ("rdcr2", Probe("rdcr2")),
        ("rdmsr 0xc0000080", Probe("rdmsr", "0xc0000080")),
        ("wrmsr 0x277 = 0x0007040600070406", Probe("wrmsr", "0x277", 0, 0, 0x0007_0406_0007_0406)),
        ("wrcr4 = 0x20", Probe("wrcr4", value=0x20)),
        ("wrdr7 = 1_000", Probe("wrdr7", value=1000)),
        ("rdflags", Probe("rdflags")),
        ("wrflags = 0x40000", Probe("wrflags", value=0x40000)),
        ("rdseg", Probe("rdseg")),
        ("write guest.a.pte = 0", Probe("write", "guest.a.pte", 0, 0, 0)),
        ("write guest.a.pte = &guest.a.pte-rw", Probe("write", "guest.a.pte", 0, 0, "&guest.a.pte-rw")),
        ("read a+0xFFFFFFFFFFFFFFFF", Probe("read", "a", (1 << 64) - 1)),
    ],
)
def test_good(text: str, probe: Probe) -> None:
    assert parse_probe(text) == probe
    assert parse_probe(str(probe)) == probe


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a probe"),
        ("jump a", "is not a probe"),
        ("end", "is not a probe"),
        ("READ a", "is not a probe"),
        ("read a b", "is not a probe"),
        ("read3 a", "is not a probe"),
        ("read16 a", "is not a probe"),
        ("read a +8", "is not a probe"),
        ("read a-8", "is not a probe"),
        ("write a = ", "is not a probe"),
        ("read -1", "is not a probe"),
        ("fetch4 a", "takes no size"),
        ("invlpg8 a", "takes no size"),
        ("read", "needs a target"),
        ("fetch", "needs a target"),
        ("rdmsr", "needs a target"),
        ("rdcr2 a", "takes no target"),
        ("wrcr4 a = 1", "takes no target"),
        ("read a = 1", "takes no value"),
        ("fetch a = 1", "takes no value"),
        ("rdcr2 = 1", "takes no value"),
        ("wrcr4", "needs a value"),
        ("wrmsr 0x277", "needs a value"),
        ("wrflags", "needs a value"),
        ("lar", "needs a value"),
        ("pop", "needs a target"),
        ("push8 a", "takes no size"),
        ("pop a = 1", "takes no value"),
        ("read a+zz", "'zz' is not a number"),
        ("write a = zz", "'zz' is not a number"),
        ("write a = 08", "'08' is not a number"),
        ("write a = 0x1_0000_0000_0000_0000", "does not fit in 64 bits"),
        ("read a+0x1_0000_0000_0000_0000", "does not fit in 64 bits"),
        ("read a\nread b", "is not a probe"),
    ],
)
def test_bad(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_probe(text)
    assert repr(text) in str(caught.value) or text in str(caught.value)


@given(
    st.sampled_from([k for k in PROBES if k != "end"]), st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["a", "d", "0x8000", "0xc0000080", "guest.b.pde"]), st.integers(0, 1 << 20),
    st.integers(0, (1 << 64) - 1),
)
def test_written_and_read_again(kind: str, size: int, target: str, offset: int, value: int) -> None:
    target = target if kind in MEMORY | PORTS or kind.endswith("msr") else ""
    valued = kind.startswith("wr") or kind in STORES | REPEATED | STEPPED.keys() | {"lar", "lmsw"}
    probe = Probe(kind, target, offset if target else 0, size if kind in SIZED else 0, value if valued else None)
    assert parse_probe(str(probe)) == probe


@given(st.text(alphabet="readwifctlpgmv+=0x ab.12\n", max_size=20))
def test_any_text_is_a_probe_or_an_error(text: str) -> None:
    try:
        probe = parse_probe(text)
    except ValueError:
        return
    assert parse_probe(str(probe)) == probe


@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        (Change(5), 0xFF, 5),
        (Change(None, ("p", "nx"), ("rw",)), 2, 1 << 63 | 1),
        (Change(0xF0, ("p",), ("d",)), 7, 0xB1),
        (Change(None, ("p",), ("p",)), 0, 0),  # cleared last
        (Change(), 9, 9),
    ],
)
def test_change(change: Change, old: int, new: int) -> None:
    assert change.apply(old, {"p": 1, "rw": 2, "d": 0x40, "nx": 1 << 63}) == new


def test_change_of_an_unknown_bit() -> None:
    with pytest.raises(KeyError, match="zap"):
        Change(None, ("zap",)).apply(0, {"p": 1})
