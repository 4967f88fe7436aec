"""docs/shadow.svg: one read of L2's, from gVA through three tables to hPA, as a real run had it.

    python -m harness.shadow_doc         # boots kvm-on-tcg, and draws it anew
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

from harness.lockstep.compare import Context
from harness.lockstep.driver import Lockstep
from harness.lockstep.twin import Twin
from harness.machine import kvm_on_tcg
from harness.machine.l0_kvm import L0Kvm
from harness.model import Access, Reached, Vmcb, by_vmcb, translate
from harness.model.backing import Backing, look_up
from harness.model.entries import FRAME
from harness.model.memory import Memory
from harness.model.ranges import NestedTable
from harness.model.walk import GUEST
from harness.scenario.ops import RunOp, Scenario, parse_probe
from harness.scenario.program import Compiler
from harness.wire.layout import RECORDS
from harness.wire.records import Record

PICTURE: Final = Path(__file__).resolve().parents[1] / "docs" / "shadow.svg"

Entries = Sequence[tuple[str, int, int]]
"""Name, address and value of each."""

_WIDE, _HIGH, _LABEL, _TOP, _LINE = 232, 40, 128, 64, 15
_STYLE: Final = (
    "text{font:12px ui-monospace,monospace;fill:#1b1f24}.h{font-weight:600}.d{fill:#5d6670}"
    "rect{fill:#fff;stroke:#98a2ad}.n{fill:#eef3fb}.m{fill:#f4f1ea}.s{fill:#e9f5ec}.a{fill:#fff3d6}"
)


class Column(NamedTuple):
    """One access of the walk, to an entry of L2's tables or to the page itself: its `gpa`, L1's entries for it and what
    they come to, L0's for that, and those of the shadow, which the processor walks. `value` is what lies there."""

    title: str
    gpa: int
    nested: Entries
    spa: int
    process: int
    page_map: Entries
    hpa: int
    shadow: Entries
    reached: int
    value: int


def columns(l0: L0Kvm, nested: NestedTable, backing: Backing, guest: Entries, page: int) -> Iterator[Column]:
    """Of L2's entries `guest`, each with its gPA, and of the page at gPA `page` that they lead to."""
    kvm, words = l0.look(), l0.memory.words
    for name, gpa, _ in (*guest, ("page", page, 0)):
        spa = nested.down(nested.root(), gpa, 12).at(gpa)
        frame, slot = backing.frame(spa), backing.slot(spa)
        assert frame is not None and slot is not None, "L2 has read there"
        hpa = frame & FRAME | spa & 0xFFF
        trail: list[tuple[str, int, int]] = []
        found = look_up(words, l0.shape.formats()[0], kvm.l2_root, gpa, trail)
        assert found is not None, "L2 has read there"
        title = "the page itself" if name == "page" else f"L2's {name}"
        yield Column(title, gpa, nested.steps(gpa), spa, slot.process + spa - slot.start, backing.walk(spa), hpa, trail,
                     found.address, words[hpa >> 3])


def svg(gva: int, gcr3: int, walked: Sequence[Column]) -> str:
    """The whole file: a column for each access, in it from the top L1's table, L0's map, and the shadow below them."""
    rows = (max(len(one.nested) for one in walked), max(len(one.page_map) for one in walked),
            max(len(one.shadow) for one in walked))
    tops = [_TOP + _HIGH]
    for count in rows:
        tops.append(tops[-1] + (count + 1) * _HIGH + 8)
    width, height = _LABEL + _WIDE * len(walked) + 8, tops[3] + _HIGH + 8
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
           f"<style>{_STYLE}</style>", '<rect width="100%" height="100%" style="stroke:none"/>',
           _text(8, 22, f"L2 reads gVA {gva:#x}: five accesses by gPA, gCR3 {gcr3:#x}", "h")]
    labels = (("L1's nested", "table", "(KVM walks it)"), ("L0's page map", "of L1's process"),
              ("the shadow", "(the processor", "walks it)"), ("what is there",))
    for top, label in zip(tops, labels, strict=True):
        out += [_text(8, top + _LINE * (n + 1), text, "h" if not n else "d") for n, text in enumerate(label)]
    for number, one in enumerate(walked):
        left = _LABEL + _WIDE * number
        out.append(_text(left + 8, _TOP - 8, one.title, "h"))
        out += _box(left, _TOP, "a", f"gPA {one.gpa:#x}", "what the processor is to read")
        for at, (name, address, entry) in enumerate(one.nested):
            out += _box(left, tops[0] + at * _HIGH, "n", f"{name} {entry:#x}", f"sPA {address:#x}")
        out += _box(left, tops[0] + len(one.nested) * _HIGH, "a", f"sPA {one.spa:#x}", f"process {one.process:#x}")
        for at, (name, address, entry) in enumerate(one.page_map):
            out += _box(left, tops[1] + at * _HIGH, "m", f"{name} {entry:#x}", f"hPA {address:#x}")
        out += _box(left, tops[1] + len(one.page_map) * _HIGH, "a", f"hPA {one.hpa:#x}", "as L1 and L0 have it")
        for at, (name, address, entry) in enumerate(one.shadow):
            out += _box(left, tops[2] + at * _HIGH, "s", f"{name} {entry:#x}", f"hPA {address:#x}")
        same = "the same" if one.reached == one.hpa else "ANOTHER"
        out += _box(left, tops[2] + len(one.shadow) * _HIGH, "a", f"hPA {one.reached:#x}", f"{same}, as KVM has it")
        out += _box(left, tops[3], "", f"{one.value:#x}", "read by L2" if number == len(walked) - 1 else
                    "leads to the next column")
    return "\n".join([*out, "</svg>"]) + "\n"


def _box(left: int, top: int, kind: str, said: str, below: str) -> Iterator[str]:
    yield f'<rect class="{kind}" x="{left}" y="{top}" width="{_WIDE - 8}" height="{_HIGH - 6}" rx="4"/>'
    yield _text(left + 8, top + 14, said, "")
    yield _text(left + 8, top + 28, below, "d")


def _text(x: int, y: int, said: str, kind: str) -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(said)}</text>'


def main() -> None:
    """Run one read of L2's, and draw it while L1 stands still behind its #VMEXIT."""
    scenario = Scenario("shadow-doc", "A read", "15.25.5", "", (RunOp((parse_probe("read a"),)),))
    with kvm_on_tcg.start(options=kvm_on_tcg.Options(audit=1)) as machine:
        program = Compiler(machine.image, machine.cpu).compile(scenario)
        l0, memory, drawn = machine.kvm, Memory.over(machine.memory), list[str]()
        assert l0 is not None
        gva = program.world.gva["a"]

        def see(context: Context, record: Record) -> None:
            if record.kind != RECORDS["EXIT"]:
                return
            paging = by_vmcb(Vmcb(memory, record.vmcb), cpu=machine.cpu)
            walk = translate(paging, memory.words, gva, Access())
            assert isinstance(walk.outcome, Reached) and paging.nested is not None
            backing = Backing(l0.memory, l0.host_format)
            backing.is_current(l0.look())
            nested = NestedTable(paging.nested, paging.ncr3, backing, l0.memory.words)
            gpas = _gpas(paging.gcr3, [(step.level, step.address, step.entry) for step in walk.steps
                                       if step.dimension == GUEST])
            drawn.append(svg(gva, paging.gcr3, list(columns(l0, nested, backing, gpas, walk.outcome.gpa))))

        twin = Twin(machine.image, machine.cpu, machine.liberties)
        (result,) = Lockstep(machine, machine.channel, twin, strict=True, witness=see).run([program])
        assert result.lost is None and not result.divergences, result
    PICTURE.write_text(drawn[0], encoding="utf-8")


def _gpas(gcr3: int, steps: Entries) -> list[tuple[str, int, int]]:
    """L2's entries, each at its gPA in place of its sPA: the offset in a page is the same, the page is what the entry
    above says."""
    out, table = [], gcr3 & FRAME
    for name, spa, entry in steps:
        out.append((name, table | spa & 0xFFF, entry))
        table = entry & FRAME
    return out


if __name__ == "__main__":
    main()
    print(f"written: {PICTURE}")
