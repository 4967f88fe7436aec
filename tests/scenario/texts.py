"""Scenario texts for tests."""

from __future__ import annotations

from harness.scenario.files import parse
from harness.scenario.ops import Scenario

HEAD = 'title = "t"\nmanual = "15.25"\nshows = "s"\n'
"""What every scenario file needs: three lines."""


def text(*ops: str, head: str = "") -> str:
    """A scenario file: `head` above, and one [[op]] for each of `ops`, which are lines of TOML."""
    return HEAD + head + "".join(f"\n[[op]]\n{op}\n" for op in ops)


def one(*ops: str, head: str = "", name: str = "test") -> Scenario:
    """The scenario of such a file. An op that is no TOML is a run: `one("read a; write b")`."""
    lines = [op if "=" in op and op.split("=")[0].strip().isidentifier() else run(op) for op in ops]
    (scenario,) = parse(text(*lines, head=head), f"{name}.toml", name)
    return scenario


def run(probes: str, cpl: int = 0) -> str:
    """The lines of a run op; probes are separated by semicolons."""
    return f"run = [{', '.join(repr(p.strip()) for p in probes.split(';') if p.strip())}]\ncpl = {cpl}"


def set_bits(entry: str, *bits: str) -> str:
    return f'entry = "{entry}"\nset = {list(bits)}'.replace("'", '"')


def clear_bits(entry: str, *bits: str) -> str:
    return f'entry = "{entry}"\nclear = {list(bits)}'.replace("'", '"')
