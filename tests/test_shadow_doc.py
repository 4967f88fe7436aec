"""The picture in docs/shadow.md: what it draws, and that the one there is of a shadow that was right."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from harness.model.entries import FRAME, RW, P
from harness.shadow_doc import PICTURE, Column, columns, svg
from tests.lockstep.test_audit import L0
from tests.model.shadows import World


def drawn(world: World) -> tuple[list[Column], str]:
    auditor = world.auditor()
    auditor.begin(world.kvm())
    gpa = world.gpa + 3 * 4096
    world.memory.words[world.hpa((2 << 20) + 3 * 4096) >> 3] = 0xC0FFEE
    guest = [("pml4e", world.gpa + 8, 0), ("pte", world.gpa + 4096, 0)]
    found = list(columns(L0(world), world.nested(auditor), auditor.backing, guest, gpa))  # type: ignore[arg-type]
    return found, svg(0x1234_5000, world.gpa, found)


def texts(picture: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(picture).iter() if node.tag.endswith("text")]


def test_every_entry_of_all_tables_is_drawn() -> None:
    world = World("4-level")
    found, picture = drawn(world)
    assert [one.title for one in found] == ["L2's pml4e", "L2's pte", "the page itself"]
    assert [(len(one.nested), len(one.page_map), len(one.shadow)) for one in found] == [(4, 5, 5)] * 3
    assert all(one.hpa == one.reached for one in found) and found[-1].value == 0xC0FFEE
    assert found[0].spa == (2 << 20) + 8
    said = texts(picture)
    for one in found:
        for name, address, entry in (*one.nested, *one.page_map, *one.shadow):
            assert f"{name} {entry:#x}" in said and any(text.endswith(f"PA {address:#x}") for text in said)
    assert "0xc0ffee" in said and not any("ANOTHER" in text for text in said)


def test_a_shadow_that_leads_elsewhere_shows() -> None:
    world = World("4-level")
    world.change("shadow.3", set=world.hpa(0x5000) | P | RW, clear=FRAME)
    assert sum("ANOTHER" in text for text in texts(drawn(world)[1])) == 1


def test_the_one_in_the_documents() -> None:
    said = texts(PICTURE.read_text(encoding="utf-8"))
    assert [text for text in said if text.startswith("L2's ")] == ["L2's pml4e", "L2's pdpte", "L2's pde", "L2's pte"]
    hpas = [re.fullmatch(r"hPA (0x[0-9a-f]+)", text) for text in said]
    ends: dict[str, list[str]] = {said[n + 1]: [] for n in range(len(said) - 1) if said[n + 1].endswith("have it")}
    for number, match in enumerate(hpas[:-1]):
        if match and said[number + 1] in ends:
            ends[said[number + 1]].append(match[1])
    assert len(ends["as L1 and L0 have it"]) == 5
    assert said.count("the same, as KVM has it") == 5 and "read by L2" in said
