"""`twinwalk explain`: walks in dumps and in bundles, in text and drawn; files that are none."""

from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from harness import cli
from harness.machine.dump import Dump
from harness.model.entries import PAT_LARGE
from harness.replay import models
from harness.report.bundle import read, write
from tests.model.tables import GVA, PS, RW, US, Space
from tests.report.test_bundle import ABOUT, BUNDLE
from tests.scenario.texts import one, run
from tests.test_library_use import PAGE, SPA, VMCB, dump

BASE = 0x10_0000
"""Where the second range of the ELF file begins, in memory."""


@pytest.fixture(scope="module")
def space() -> Space:
    return dump()


@pytest.fixture
def raw(space: Space, tmp_path: Path) -> Path:
    path = tmp_path / "memory.bin"
    path.write_bytes(space.memory.bytes)
    return path


def elf(ranges: list[tuple[int, bytes]]) -> bytes:
    """As `dump-guest-memory` has it: a segment for each range, and no sections."""
    at = 64 + 56 * len(ranges)
    headers, data = b"", b""
    for start, content in ranges:
        headers += struct.pack("<IIQQQQQQ", 1, 0, at + len(data), 0, start, len(content), len(content), 0)
        data += content
    ident = b"\x7fELF\2\1\1" + bytes(9)
    return ident + struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(ranges), 0, 0, 0) + headers + data


def explained(capsys: pytest.CaptureFixture[str], *argv: object) -> list[str]:
    assert cli.main(["explain", *map(str, argv)]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert cli.main(["explain", *map(str, argv)]) == 2
    return capsys.readouterr().err


def test_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told that it is not there, not what else a dump wants."""
    assert "none.twin: no such file or folder: give a bundle" in refused(capsys, tmp_path / "none.twin")


class TestDump:
    def test_a_fault(self, raw: Path, space: Space, capsys: pytest.CaptureFixture[str]) -> None:
        """All 24 references, the last one marked, and the rule."""
        by_vmcb = explained(capsys, raw, hex(GVA), "--vmcb", hex(VMCB), "--access", "write", "--user")
        assert by_vmcb[0] == f"#NPF 0x100000007 (P|W|U|FINAL) at gPA {PAGE:#x}"
        assert "rule nested.write (AMD APM vol. 2, 15.25.7)" in by_vmcb[1]
        steps = [text for text in by_vmcb if " at sPA " in text or " at gPA " in text or "ends here" in text][1:]
        assert len(steps) == 24 and steps[-1].endswith("ends here: R/W=0")
        assert sum("+A +D" in text for text in steps) == 4, "a guest table is written, by the nested walk"
        by_cr3 = explained(capsys, raw, GVA, "--cr3", space.gcr3, "--ncr3", space.ncr3, "--access", "write", "--user")
        assert by_cr3 == by_vmcb

    def test_a_page(self, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = explained(capsys, raw, hex(GVA), "--vmcb", hex(VMCB), "--access", "fetch")
        assert text[0] == f"sPA {SPA:#x}" and text[-1].endswith(f"page at sPA {SPA:#x}")

    def test_one_dimension(self, raw: Path, space: Space, capsys: pytest.CaptureFixture[str]) -> None:
        text = explained(capsys, raw, hex(PAGE), "--cr3", space.ncr3)
        assert text[0] == f"sPA {SPA:#x}" and text[-1].endswith(f"page at sPA {SPA:#x}")
        assert "gPA" not in "".join(text[4:])

    def test_large_pages(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Their PAT bit is none of the address."""
        space = Space(nested=False)
        space.map_guest(GVA, 2 << 21, 21, bits=RW | US | PS | PAT_LARGE | 1)
        (tmp_path / "m").write_bytes(space.memory.bytes)
        text = explained(capsys, tmp_path / "m", GVA, "--cr3", space.gcr3)
        assert text[-1].endswith(f"page at sPA {2 << 21:#x}")

    def test_elf(self, raw: Path, space: Space, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Ranges with a hole between them: the same walk as in the plain file."""
        low, high = bytes(space.memory.bytes[:BASE]), b"high" * 1024
        path = tmp_path / "dump.elf"
        path.write_bytes(elf([(BASE * 2, high), (0, low)]))
        assert explained(capsys, path, GVA, "--vmcb", VMCB) == explained(capsys, raw, GVA, "--vmcb", VMCB)
        memory = Dump(path)
        assert memory[BASE * 2 >> 3] == int.from_bytes(b"highhigh", "little")
        assert memory.read(BASE * 2 + 4, 4) == b"high"
        for at in (BASE, BASE * 2 - 8, BASE * 2 + len(high)):
            with pytest.raises(IndexError, match="not in the dump"):
                memory[at >> 3]

    def test_drawn(self, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """24 boxes behind the background, one of them marked, and what they say is what is in memory."""
        path = tmp_path / "walk.svg"
        explained(capsys, raw, GVA, "--vmcb", VMCB, "--access", "write", "--svg", path)
        name = "{http://www.w3.org/2000/svg}"
        root = ET.parse(path).getroot()
        boxes = [box for box in root.iter(f"{name}rect") if box.get("height") != "100%"]
        assert len(boxes) == 24 and [box.get("class") for box in boxes].count("x") == 1
        said = [text.text for text in root.iter(f"{name}text")]
        assert "nested pml4e" in said and "guest's entry" in said and "654005" in said
        assert any("#NPF" in str(text) for text in said)
        width = float(root.get("width", "0"))
        assert all(0 <= float(box.get("x", "-1")) <= width - float(box.get("width", "0")) for box in boxes)


class TestWrongUse:
    @pytest.mark.parametrize(
        ("content", "why"),
        [(b"", "0 bytes"), (b"KDUMP   " + bytes(100), "packed"), (b"\x7fELF" + bytes(100), "damaged"),
         (elf([]), "no dump"), (elf([(0, bytes(8192))])[:-100], "cut off"),
         (bytes(4096), "leads out of memory")],
    )
    def test_files(self, content: bytes, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "file"
        path.write_bytes(content)
        said = refused(capsys, path, "0x1000", "--cr3", "0x1000", "--ncr3", "0x2000")
        assert str(path) in said and why in said

    def test_no_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no such file" in refused(capsys, tmp_path / "none", "0", "--cr3", "0")
        assert "bundle.json" in refused(capsys, tmp_path, "0")

    def test_what_is_missing(self, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for argv in ((), ("0x1000",), ("0x1000", "--vmcb", "0", "--cr3", "0"), ("--cr3", "0")):
            assert "give an address" in refused(capsys, raw, *argv)
        assert "no VMCB" in refused(capsys, raw, "0x1000", "--vmcb", "0x30000")
        assert "32 to 52" in refused(capsys, raw, "0x1000", "--cr3", "0", "--maxphyaddr", "53")


class TestBundle:
    """The model runs its scenario."""

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Path:
        scenario = one('entry = "nested.a.pte"\nclear = ["rw"]', run("read a; write a"), name="x")
        machine = {"machine": "tcg", "maxphyaddr": 40, "asids": 16, "svm_features": 1, "features": ["nx", "page1g"]}
        wrong = {"op": 1, "probe": 1, "check": "C1", "field": "exitinfo1", "expected": "0x100000007",
                 "observed": "0x100000005", "rule": "nested.write"}
        about = replace(ABOUT, machine=machine, divergences=[wrong])
        records = ({"kind": "EXIT", "op": 1, "vmcb": {"ncr3": "0x1234000"}},)
        return write(tmp_path, replace(BUNDLE, about=about, scenario=scenario, records=records, walks="both walks"))

    def test_its_finding(self, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "walk.svg"
        text = explained(capsys, bundle, "--svg", path)
        assert text[0] == "both walks" and "VMCB EXIT  ncr3 0x1234000" in text
        drawn = path.read_text()
        assert "0x100000007" in drawn and "on the machine: #NPF 0x100000005" in drawn
        rights = re.findall(">(P RW US.*?|P US.*?)<", drawn)
        assert len(rights) == 24 and all(" A" in one for one in rights), "entries are as the walk leaves them"

    def test_an_address(self, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """What is not canonical, and L2's own page, which its scenario has made read-only."""
        assert explained(capsys, bundle, "0x0000800000000000")[0].startswith("#GP")
        assert "dumps" in refused(capsys, bundle, "0", "--cr3", "0")
        found = read(bundle)
        compiler, _ = models(bundle, found)
        gva = hex(compiler.compile(found.scenario).world.gva["a"])
        assert explained(capsys, bundle, gva)[0].startswith("sPA ")
        text = explained(capsys, bundle, gva, "--access", "write")
        assert text[0].startswith("#NPF") and text[-1].endswith("ends here: R/W=0")
