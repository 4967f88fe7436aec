"""A walk as a drawing: the grid that it is, a row for each entry of L2's tables, its own nested walk before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final
from xml.sax.saxutils import escape

from harness.report import words
from harness.report.findings import Finding
from harness.report.html import grid

_WIDE, _HIGH, _LABEL, _TOP, _LINE = 178, 62, 84, 58, 15
_STYLE: Final = (
    "text{font:12px ui-monospace,monospace;fill:#1b1f24}.h{font-weight:600}.d{fill:#5d6670}.b{fill:#b3261e}"
    "rect{fill:#fff;stroke:#98a2ad}.g{fill:#f0f3f6}.x{fill:#fde9e7;stroke:#b3261e;stroke-width:2}"
)


def text(finding: Finding) -> str:
    """The whole file. `finding` must have a walk."""
    drawn = grid(finding)
    columns, rows = drawn["columns"], drawn["rows"]
    heads = [*(f"nested {name}" for name in columns), *(["guest's entry"] if any(row["guest"] for row in rows) else [])]
    width = max(_LABEL + _WIDE * len(heads), 700)
    height = _TOP + _HIGH * len(rows) + 2 * _LINE
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
           f"<style>{_STYLE}</style>", '<rect width="100%" height="100%" style="stroke:none"/>',
           _text(8, 20, f"the walk ends in {drawn['model']}", "h b" if not _reached(drawn) else "h")]
    out += [_text(_LABEL + _WIDE * n + 8, _TOP - 8, name, "h") for n, name in enumerate(heads)]
    for number, row in enumerate(rows):
        top = _TOP + _HIGH * number
        out.append(_text(8, top + 20, row["label"], "h"))
        for cell in row["nested"]:
            out += _cell(cell, _LABEL + _WIDE * columns.index(cell["level"]), top, "")
        if row["guest"]:
            out += _cell(row["guest"], _LABEL + _WIDE * len(columns), top, "g")
    said = f"on the machine: {drawn['machine']}" if drawn["differs"] else drawn["why"]
    out += [_text(8, height - 10, said, "b")] if said else []
    return "\n".join([*out, "</svg>"]) + "\n"


def _reached(drawn: dict[str, Any]) -> bool:
    return not any(cell["last"] for row in drawn["rows"] for cell in [*row["nested"], row["guest"]] if cell)


def _cell(cell: dict[str, Any], left: int, top: int, kind: str) -> Iterator[str]:
    bad = cell["last"] or cell["differs"] or cell["first"]
    yield f'<rect class="{"x" if bad else kind}" x="{left}" y="{top}" width="{_WIDE - 6}" height="{_HIGH - 6}" rx="4"/>'
    yield _text(left + 8, top + _LINE, f"sPA {cell['at']}", "d")
    yield _text(left + 8, top + 2 * _LINE, cell["model"], "")
    differs = cell["machine"] is not None and cell["machine"] != cell["model"]
    flags = " ".join(words.flags(int(cell["model"], 16), cell["level"]))
    yield _text(left + 8, top + 3 * _LINE, cell["machine"] if differs else flags, "b" if differs else "d")


def _text(x: int, y: int, said: str, kind: str) -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(said)}</text>'
