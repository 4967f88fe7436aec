"""Sessions on other hosts, against a far side that says what the test wants it to."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness import far
from harness.errors import LaunchFailed, UsageError
from harness.far import ConnectionLost, FarSession
from harness.lockstep import errata
from harness.lockstep.compare import Divergence
from harness.lockstep.errata import Erratum
from harness.lockstep.result import Result, Switch, Told, Under, Visit
from harness.machine import bootstrap, ssh
from harness.machine.address import Address, parse
from harness.machine.ssh import Gone, Unreachable
from harness.model.access import NestedPageFault
from harness.model.walk import Walk
from harness.options import place
from harness.scenario import files
from harness.scenario.ops import Scenario
from harness.session import Done, Unit
from harness.target import Target
from harness.typed_json import decode, encode
from tests.conftest import LIBRARY

SCENARIOS = tuple(files.load([LIBRARY / "first-light.toml", LIBRARY / "ad"]))[:4]


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(encode(value)))


class TestPlain:
    def test_the_library(self) -> None:
        """Scenarios and errata come out of it as they went in."""
        for scenario in files.load([LIBRARY / "ad", LIBRARY / "vmrun", LIBRARY / "state", LIBRARY / "flush"]):
            assert decode(Scenario, through_json(scenario)) == scenario
        for erratum in errata.load(LIBRARY / "errata"):
            assert decode(Erratum, through_json(erratum)) == erratum

    def test_a_divergence_with_its_walk(self) -> None:
        walk = Walk(NestedPageFault(0x1_0000_0007, 1 << 51), "nested.write", [("nested", "pte", "final", 8, 1 << 63)],
                    [(8, 32, "page")])
        one = Divergence("a", 1, 0, "C1", "exitinfo1", (1 << 64) - 1, "0x5", "nested.write", walk, (7,), ("WB",), None)
        result = Result("a", divergences=[one], visits=[Visit(1, 0, 0x400, 7, 1 << 51, Under(4, 1 << 12, 3))],
                        switches=[None, Switch(None, (Told(False, "a"),), Told(True, "b"), 2)])
        assert decode(Result, through_json(result)) == result

    @pytest.mark.parametrize("value", [
        None, 1, "Result", [], ["Result"], ["Scenario", "a"],
        ["Result", 1, 0, 0, 0, [], None, "", "", 0, 0, 0, 0, 0, 0, [], []],
        ["Result", "a", True, 0, 0, [], None, "", "", 0, 0, 0, 0, 0, 0, [], []],
        ["Result", "a", 0, 0, 0, [["Popen", "sh"]], None, "", "", 0, 0, 0, 0, 0, 0, [], []],
        ["Result", "a", 0, 0, 0, {}, None, "", "", 0, 0, 0, 0, 0, 0, [], []],
    ], ids=str)
    def test_anything_else(self, value: Any) -> None:
        assert len(through_json(Result("a"))) == 17, "the values of this test are of another shape"
        with pytest.raises(ValueError, match="no Result"):
            decode(Result, value)


class TestAddress:
    @pytest.mark.parametrize(("text", "address", "kind"), [
        ("ssh://lab", Address("lab"), "kvm"), ("ssh://me@lab:2222/tcg", Address("lab", "me", 2222), "tcg"),
        ("ssh://[fe80::1]:22/kvm-on-tcg", Address("fe80::1", "", 22), "kvm-on-tcg"),
        ("ssh://lab/", Address("lab"), "kvm"),
        ("tcg", None, "tcg"), ("auto", None, "auto"),
    ])
    def test_read(self, text: str, address: Address | None, kind: str) -> None:
        assert place(text) == (address, kind)
        if address is not None:
            assert parse(f"ssh://{address}")[0] == address

    @pytest.mark.parametrize("text", [
        "ssh://", "ssh:///tcg", "ssh://lab/toaster", "ssh://lab/auto", "ssh://lab:99999", "ssh://lab:x",
        "ssh://-oX/tcg", "ssh://-l@lab", "ssh://a b", "ssh://me:hush@lab", "ssh://lab?x", "toaster", "",
    ])
    def test_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"ssh://|key|port|machine") as said:
            place(text)
        assert "hush" not in str(said.value)


class FakeFar:
    """A connection: the far side does each scenario it is given, and `script` has what it says instead at its n-th
    result of all; an exception breaks the connection."""

    script: Mapping[int, Any]
    said: int
    opened: int

    def __init__(self, address: Address, module: str) -> None:
        type(self).opened += 1
        self.inbox: list[Mapping[str, Any]] = []

    def tell(self, message: Mapping[str, Any]) -> None:
        self.inbox.append(json.loads(json.dumps(message)))

    def messages(self) -> Iterator[dict[str, Any]]:
        yield {"ready": True}
        while True:
            message = self.inbox.pop(0)
            for index, plain in (one for batch in message.get("batches", ()) for one in batch):
                answer = {"unit": message["unit"], "index": index, "result": encode(Result(plain[1], vmruns=index)),
                          "cells": [], "records": [], "identity": None}
                type(self).said += 1
                instead = self.script.get(type(self).said)
                if isinstance(instead, Exception):
                    raise instead
                yield answer | (instead or {})
            if "unit" in message:
                yield {"unit": message["unit"], "done": True}

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeFar]:
    kind = type("Fake", (FakeFar,), {"script": {}, "said": 0, "opened": 0})
    monkeypatch.setattr(ssh, "Far", kind)
    monkeypatch.setattr(far, "_PAUSE", 0.01)
    return kind


def _run(batches: int = 2) -> list[Done]:
    units = [Unit(tuple((one,) for one in SCENARIOS), False)] * batches
    with FarSession(Target("tcg", host=Address("lab")), (), False) as session:
        return list(session.run(units))


class TestSession:
    def test_all(self, fake: type[FakeFar]) -> None:
        assert [done.scenario for done in _run()] == [*SCENARIOS, *SCENARIOS] and fake.opened == 1

    @pytest.mark.parametrize("at", range(1, 9))
    def test_broken(self, fake: type[FakeFar], at: int) -> None:
        """Wherever: all is there once, in its order."""
        fake.script = {at: Gone("cut")}
        done = _run()
        assert [one.scenario for one in done] == [*SCENARIOS, *SCENARIOS] and fake.opened == 2
        assert not any(one.result.lost for one in done)

    def test_broken_twice_in_one(self, fake: type[FakeFar]) -> None:
        """Then it is that one's doing, and the others go on."""
        fake.script = {2: Gone("cut"), 3: Gone("cut again")}
        done = _run()
        assert [one.scenario for one in done] == [*SCENARIOS, *SCENARIOS]
        (lost,) = [one for one in done if one.result.lost]
        assert lost is done[1] and lost.result.lost is not None and "cut again" in lost.result.lost.reason

    def test_gone(self, fake: type[FakeFar], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(far, "RETRY", 0.05)
        fake.script = {3: Gone("cut")}

        def first(self: FakeFar, address: Address, module: str) -> None:
            if fake.opened:
                raise Unreachable("nobody there")
            FakeFar.__init__(self, address, module)

        monkeypatch.setattr(fake, "__init__", first)
        with FarSession(Target("tcg", host=Address("lab")), (), False) as session:
            done = session.run([Unit(tuple((one,) for one in SCENARIOS), False)])
            assert [next(done).scenario, next(done).scenario] == [*SCENARIOS[:2]]
            with pytest.raises(ConnectionLost, match="nobody there"):
                next(done)

    @pytest.mark.parametrize("instead", [
        {"index": 0}, {"index": 99}, {"index": -1}, {"index": True}, {"index": "1"}, {"unit": 7}, {"result": None},
        {"result": encode(Result("another"))}, {"cells": [["Cell", "a"]]}, {"identity": ["Identity"]},
        {"records": None}, {"unit": None},
    ], ids=str)
    def test_nonsense(self, fake: type[FakeFar], instead: Mapping[str, Any]) -> None:
        """What was not asked for, or is of another shape, is no result."""
        fake.script = {2: instead}
        with pytest.raises(ConnectionLost, match="makes no sense"):
            _run()

    @pytest.mark.parametrize(("instead", "kind"), [
        ({"error": "usage", "text": "a\x1b[31m"}, UsageError), ({"error": "launch", "text": "b"}, LaunchFailed),
        ({"error": "other", "text": "c"}, ConnectionLost), ({"cannot": "d"}, LaunchFailed),
    ])
    def test_its_errors(self, fake: type[FakeFar], instead: Mapping[str, Any], kind: type[Exception]) -> None:
        fake.script = {2: instead}
        with pytest.raises(kind) as said:
            _run()
        assert "\x1b" not in str(said.value)


class TestUnpacking:
    @pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\evil"])
    def test_paths_that_lead_elsewhere(self, tmp_path: Path, name: str) -> None:
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr(name, b"x")
        (tmp_path / "in").mkdir()
        with zipfile.ZipFile(data) as archive, pytest.raises(bootstrap.CannotRun, match="leads elsewhere"):
            bootstrap.unpack(archive, str(tmp_path / "in"))
        assert list(tmp_path.rglob("*evil*")) == []

    def test_damaged(self) -> None:
        head = json.dumps({"size": 3, "sha256": "0" * 64}).encode()
        with pytest.raises(bootstrap.CannotRun, match="did not arrive whole"):
            bootstrap.receive(io.BytesIO(head + b"\nabc"))
