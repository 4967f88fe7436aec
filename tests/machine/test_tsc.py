"""The counter of this host, by its own kernel's word where that says it."""

from __future__ import annotations

import mmap
import platform
import time

import pytest

from harness.machine import tsc


@pytest.fixture(autouse=True)
def anew() -> None:
    tsc.frequency.cache_clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="this host has no TSC")
def test_it_is_the_same_each_time() -> None:
    """And what a second of it is."""
    first = tsc.frequency()
    tsc.frequency.cache_clear()
    assert first == pytest.approx(tsc.frequency(), rel=1e-3) and first > 100_000
    assert tsc.known() == [f"tsc_early_khz={tsc.frequency()}"]


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert tsc.frequency() == 0 and tsc.known() == []


def test_where_memory_is_not_to_be_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise PermissionError

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert tsc.known() == []


def test_a_counter_of_known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the tries are held up between the two looks at the clock."""
    now = 0

    def read() -> int:
        return now * 3

    def clock() -> int:
        nonlocal now
        now += 50 if now % 3 else 5_000_000
        return now

    monkeypatch.setattr(time, "monotonic_ns", clock)
    at, count = tsc._moment(read)
    assert count / at == pytest.approx(3, rel=1e-3)
