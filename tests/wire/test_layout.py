"""The table of layouts against the compiled guest: its debug information, its symbols, its header."""

from __future__ import annotations

import itertools
import os
import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from elftools.dwarf.die import DIE
from elftools.elf.elffile import ELFFile

from harness.machine import guests
from harness.model.vmcb import FIELDS
from harness.scenario.ops import MEMORY, PORTS, SIZED
from harness.wire import layout
from harness.wire.header import c_header
from harness.wire.image import Image, tag, tags
from harness.wire.layout import Field, Struct

# ring slots, constants: what harness code relies on


def _structures(elf: Path) -> dict[str, dict[str, Any]]:
    """Of each tw_ structure in the image: its size, and offset, element size and count of each member."""
    with elf.open("rb") as file:
        dwarf = ELFFile(file).get_dwarf_info()
        out: dict[str, dict[str, Any]] = {}
        for unit in dwarf.iter_CUs():
            for die in unit.iter_DIEs():
                if die.tag != "DW_TAG_structure_type" or "DW_AT_name" not in die.attributes:
                    continue
                name = die.attributes["DW_AT_name"].value.decode()
                if name.startswith("tw_") and "DW_AT_byte_size" in die.attributes:
                    members = {
                        m.attributes["DW_AT_name"].value.decode():
                            (m.attributes["DW_AT_data_member_location"].value, *_type(m))
                        for m in die.iter_children() if m.tag == "DW_TAG_member"
                    }
                    out[name] = {"size": die.attributes["DW_AT_byte_size"].value, "members": members}
        return out


def _type(die: DIE) -> tuple[int, int]:
    """Element size and count."""
    kind = die.get_DIE_from_attribute("DW_AT_type")
    count = 1
    while "DW_AT_byte_size" not in kind.attributes:
        for child in kind.iter_children():
            if "DW_AT_upper_bound" in child.attributes:
                count *= child.attributes["DW_AT_upper_bound"].value + 1
        kind = kind.get_DIE_from_attribute("DW_AT_type")
    return kind.attributes["DW_AT_byte_size"].value, count


SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}


@pytest.fixture(scope="module")
def compiled(kernel: Path) -> dict[str, dict[str, Any]]:
    return _structures(kernel) | _structures(guests.build_plugin(1))


@pytest.mark.parametrize("name", layout.STRUCTS)
def test_structure_as_compiled(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    shape, found = layout.STRUCTS[name], compiled[name]
    assert found["size"] == shape.size == shape.packer.size
    expected = {}
    for field in shape.fields:
        size = SIZES[field.type] if field.type in SIZES else layout.STRUCTS[field.type].size
        expected[field.name] = (shape.offsets[field.name], size, field.count)
    assert found["members"] == expected
    assert len(shape.names) == len(shape.packer.unpack(bytes(shape.size)))


def test_every_compiled_structure_is_in_the_table(compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled.keys() == layout.STRUCTS.keys()


def test_header_compiles_alone(tmp_path: Path) -> None:
    """From C with all warnings as errors, and from assembly."""
    header = tmp_path / "wire.h"
    header.write_text(c_header())
    compiler = os.environ.get("CC", "gcc")
    c = tmp_path / "t.c"
    c.write_text('#include "wire.h"\n#include "wire.h"\n'
                 '_Static_assert(TW_SIZEOF_RECORD == sizeof(struct tw_record), "");\n'
                 '_Static_assert(TW_AT_RECORD_DIFFS == __builtin_offsetof(struct tw_record, diffs), "");\n')
    assembly = tmp_path / "t.S"
    assembly.write_text('#include "wire.h"\n.quad TW_MAGIC, TW_AT_PROBE_RESULT, TW_OP_RUN\n')
    for source in (c, assembly):
        argv = [compiler, "-ffreestanding", "-Wall", "-Wextra", "-Werror", "-c", str(source)]  # no libc is there
        done = subprocess.run([*argv, "-o", str(tmp_path / "t.o")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_header_names_every_constant() -> None:
    text = c_header()
    defined = {m[1]: int(m[2], 16) for m in re.finditer(r"#define (\w+) (0x[0-9a-f]+)", text)}
    for prefix, table in (("OP", layout.OPS), ("RECORD", layout.RECORDS), ("PROBE", layout.PROBES),
                          ("HOST", layout.HOST_REGISTERS)):
        for name, value in table.items():
            assert defined[f"TW_{prefix}_{name.upper()}"] == value
    for bit, name in enumerate(layout.FEATURES):
        assert defined[f"TW_FEATURE_{name.upper()}"] == 1 << bit
    assert defined["TW_PROTOCOL"] == layout.PROTOCOL and defined["TW_MAX_PROBES"] == layout.MAX_PROBES


def test_numbers_are_unique() -> None:
    for table in (layout.OPS, layout.RECORDS, layout.PROBES, layout.HOST_REGISTERS):
        assert len(set(table.values())) == len(table)
    assert len(set(layout.FEATURES)) == len(layout.FEATURES) <= 64
    assert SIZED - PORTS < MEMORY <= layout.PROBES.keys() and PORTS < SIZED


def test_padding_is_refused() -> None:
    shape = Struct("tw_bad", "", (Field("a", "u32"), Field("b", "u64")))
    with pytest.raises(ValueError, match=r"tw_bad\.b at 4 would be padded"):
        _ = shape.offsets


def test_sizes() -> None:
    assert layout.OP.size == layout.PROBE.size == 32  # a probe takes one slot of the op ring
    assert layout.RECORD_SIZE - 16 < layout.RECORD.size <= layout.RECORD_SIZE
    for count in (layout.OP_SLOTS, layout.RECORD_SLOTS):
        assert count & count - 1 == 0
    assert layout.RECORD.offsets["diffs"] + layout.MAX_DIFFS * layout.DIFF.size <= 4096
    assert layout.MAX_DIFFS >= 60  # a two-dimensional walk changes 24 entries at most, twice that with L2's own
    # one RUN op, its probes, and the padding in front of it fit the ring together
    assert 2 * (layout.MAX_PROBES + 1) < layout.OP_SLOTS
    assert max(f.offset + f.width for f in FIELDS.values() if f.offset < 0x400) <= layout.CONTROL_BYTES
    assert max(f.offset + f.width for f in FIELDS.values()) - 0x400 <= layout.SAVE_BYTES
    assert struct.pack("<Q", layout.MAGIC) == b"twinwalk"


class TestImage:
    def test_symbols(self, image: Image, kernel: Path) -> None:
        with kernel.open("rb") as file:
            table: Any = ELFFile(file).get_section_by_name(".symtab")
            symbols = {s.name: s["st_value"] for s in table.iter_symbols()}
        assert image.shared == symbols["tw_shared_page"] and image.stubs["long"].page == symbols["l2_long_page"]
        for address in (image.shared, image.op_ring, image.record_ring, image.mailbox,
                        *(stub.page for stub in image.stubs.values()), image.arena.start, image.data.start,
                        image.vmcbs.start):
            assert address % 4096 == 0
        # regions that the checker or L1 writes do not overlap
        rings = (image.op_ring, image.op_ring + layout.OP_SLOTS * 32)
        records = (image.record_ring, image.record_ring + layout.RECORD_SLOTS * 4096)
        mirrored = (image.arena, image.data, image.low_arena, image.low_data)
        regions = sorted([rings, records, image.vmcbs, image.low_vmcbs, *mirrored,
                          *((r.start + image.mirror_offset, r.end + image.mirror_offset) for r in mirrored),
                          (image.shared, image.shared + 4096), (image.mailbox, image.mailbox + 4096)])
        for one, other in itertools.pairwise(regions):
            assert one[1] <= other[0], (one, other)
        assert regions[-1][1] <= image.ram_end
        for high, low in ((image.vmcbs, image.low_vmcbs), (image.arena, image.low_arena), (image.data, image.low_data)):
            assert tuple(high) == (low.start + (1 << 32), low.end + (1 << 32))  # guests/l1/main.c
            assert low.end + image.mirror_offset <= image.low_end

    def test_ram_has_a_hole(self, image: Image) -> None:
        (low, low_bytes, at), (high, high_bytes, behind) = image.pieces
        assert (low, at, low_bytes, behind) == (0, 0, image.low_end, image.low_end) and high == 1 << 32
        assert high + high_bytes == image.ram_end and image.ram_bytes == low_bytes + high_bytes
        assert image.offset(image.low_end - 8) == low_bytes - 8 and image.offset(image.data.start) < image.ram_bytes

    def test_mailbox_holds_all_probes(self) -> None:
        # and what L2 keeps at its end (l2.inc)
        assert (layout.MAX_PROBES + 1) * layout.PROBE.size <= layout.MAILBOX_CODE

    @pytest.mark.parametrize("kind", ["long", "prot"])
    def test_every_probe_has_a_label(self, kind: str, image: Image) -> None:
        labels = image.stubs[kind].labels
        for probe in layout.PROBES:
            sizes = (1, 2, 4, 8) if kind == "long" and probe not in PORTS else (1, 2, 4)
            for label in [f"{probe}_{size}" for size in sizes] if probe in SIZED else [probe]:
                if label in labels:
                    assert 0 <= labels[label] < 4096
                else:
                    assert kind == "prot" or label == "overflow", f"{label} has no place in L2's code"
        accesses = [at for label, at in labels.items() if label not in ("page", "entry")]
        assert len(set(accesses)) == len(accesses)

    def test_not_l1(self) -> None:
        with pytest.raises(KeyError, match="tw_ram_end"):
            Image.from_symbols({"main": 1})


class TestTags:
    def test_as_code(self, tmp_path: Path) -> None:
        """A tag is `mov $sPA/8, %eax; jmp *%rbx; nop`."""
        raw = tag(0x4760_1238).to_bytes(8, "little")
        assert raw[0] == 0xB8 and int.from_bytes(raw[1:5], "little") == 0x4760_1238 >> 3
        assert raw[5:] == b"\xff\xe3\x90"

    def test_all_differ_and_name_their_address(self, image: Image) -> None:
        content = tags(image.data)
        assert len(content) == image.data.end - image.data.start
        words = memoryview(content).cast("Q")
        for index in (0, 1, 511, 512, len(words) - 1):
            assert words[index] == tag(image.data.start + 8 * index)
        assert len(set(words)) == len(words)
