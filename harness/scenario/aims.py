"""Recipes: ops and probes that should reach a given cell of the coverage table, and the world that it takes.

They are hints, not proofs: the rehearsal says whether the cell was reached. What no recipe knows is left to chance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Final

from harness.model.coverage import NESTED_PAGE, NESTED_TABLE, NONE, OFF, Cell
from harness.model.entries import PAGE_SHIFTS
from harness.model.intercepts import INTERCEPTS
from harness.model.vmcb import ExitCode
from harness.scenario.draws import Draw
from harness.scenario.modes import HOST_MODES, MODES
from harness.scenario.ops import NO_NESTED_PAGING, Change, EntryOp, HostOp, Op, Probe, VmcbOp
from harness.wire.layout import PROBES

Key = tuple[str, str, str, str, str]
"""What a world depends on: see harness.scenario.program.world_key."""

_RESERVED: Final = {
    "bits 62:52": ("bit52",), "G": ("g",), "PS": ("ps",), "beyond MAXPHYADDR": ("bit40", "bit45", "bit51"),
    "low frame bits": ("bit14", "bit20"), "low bits": ("rw", "us", "bit5", "bit8"), "NX": ("nx",),
}
_RIGHTS: Final = {
    "present": Change(clear=("p",)), "write": Change(clear=("rw",)), "user": Change(clear=("us",)),
    "execute": Change(set=("nx",)),
}
_EXCEPTIONS: Final = {"VMEXIT_EXCP0": "divide", "VMEXIT_EXCP3": "breakpoint", "VMEXIT_EXCP6": "undefined"}
_BY_EXIT: Final[dict[str, list[str]]] = {}
for _name, _one in INTERCEPTS.items():
    if _name in PROBES:
        _BY_EXIT.setdefault(ExitCode.describe(_one.exitcode), []).append(_name)
_SELECTIVE: Final = ("intercept_misc1", "bit5")
_EVENTS: Final = {
    "exception": (0x8000_0306, 0x8000_0300, 0x8000_0310), "interrupt": (0x8000_0010, 0x8000_001F),
    "NMI": (0x8000_0202,), "software interrupt": (0x8000_0403, 0x8000_041E),
}
_REFUSED: Final[dict[str, tuple[tuple[str, Change], ...]]] = {
    "asid": (("asid", Change(value=0)),),
    "cr0-high": tuple(("cr0", Change(set=(bit,))) for bit in ("bit32", "bit47", "bit63")),
    "cr0-nw": (("cr0", Change(set=("nw",), clear=("cd",))),),
    "cr3-mbz": tuple(("cr3", Change(set=(bit,))) for bit in ("bit40", "bit51", "bit52", "bit63")),
    "cr4-mbz": tuple(("cr4", Change(set=(bit,))) for bit in ("bit13", "bit15", "bit19", "bit31", "bit32", "bit63")),
    "cs-l-d": (("cs.attrib", Change(value=0xE9B)),),
    "dr6-high": tuple(("dr6", Change(set=(bit,))) for bit in ("bit32", "bit63")),
    "dr7-high": tuple(("dr7", Change(set=(bit,))) for bit in ("bit32", "bit63")),
    "efer-mbz": tuple(("efer", Change(set=(bit,))) for bit in ("bit9", "bit16", "bit22", "bit63")),
    "efer-svme": (("efer", Change(clear=("svme",))),),
    "eventinj": tuple(("eventinj", Change(value=v)) for v in (0x8000_0120, 0x8000_0302, 0x8000_0309, 0x8000_0720)),
    "eventinj-mode": tuple(("eventinj", Change(value=value)) for value in (0x8000_0304, 0x8000_0305)),
    "g-pat": tuple(("g_pat", Change(value=v)) for v in (0x0007_0406_0007_0402, 0x8007_0406_0007_0406)),
    "intercept": (("intercept_misc2", Change(clear=("bit0",))),),
    "long-pae": (("cr4", Change(clear=("pae",))),),
    "long-pe": (("cr0", Change(clear=("pe",))),),
    "ncr3-mbz": tuple(("ncr3", Change(set=(bit,))) for bit in ("bit40", "bit51", "bit63")),
    "permission-maps": tuple((name, Change(value=value)) for name in ("iopm_base", "msrpm_base")
                             for value in (0x100_0000_0000, 0xF_FFFF_FFFF_F000)),
}
_ONLY_LONG: Final = {"cs-l-d", "eventinj-mode", "long-pae", "long-pe", "cr3-mbz"}


@dataclass
class Aim:
    """What should reach a cell: `ops`, then a run at `cpl` of `probes`. `last` says that nothing can follow it."""

    ops: list[Op] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    cpl: int = 0
    last: bool = False


def place(cell: Cell, random: Random) -> Key | None:
    """A world in which the cell can be reached, other things drawn; None where no recipe is known."""
    if cell.mode:
        guest, nested = cell.mode.split("/")
        if guest == OFF:
            guest = random.choice(("off", "real"))
    else:
        guest = "PAE" if cell.rule == "vmrun.pdpe" else random.choice(("4-level", "5-level"))
        nested = NONE if cell.rule == "vmrun.pdpe" else random.choice(("4-level", "PAE"))
    paged = nested != NONE
    if cell.rule == "vmrun.host-paging":
        return None  # where that is not checked, L2 runs anywhere
    if not paged:
        nested = random.choice(("4-level", "4-level", "5-level", "PAE", "32-bit", "off"))
    if paged and guest in ("off", "real") and nested == "32-bit":
        return None  # where such tables are not walked, L2 runs anywhere
    leaves = cell.level.split("/") if cell.rule == "reached" else [cell.level]
    on_guest = cell.dimension in ("guest", "both") and guest not in ("off", "real")
    guest_page = _page(leaves[0] if on_guest else "", MODES[guest].pages, random)
    if not paged:
        return guest, nested, guest_page, NO_NESTED_PAGING, "4K"
    sizes = HOST_MODES[nested].pages
    nested_page = _page(leaves[-1] if cell.dimension in (NESTED_PAGE, "both") else "", sizes, random)
    return guest, nested, guest_page, nested_page, _page(
        cell.level if cell.dimension == NESTED_TABLE else "", sizes, random)


def _page(level: str, sizes: tuple[str, ...], random: Random) -> str:
    """A size of pages that makes such a level; without one any, the usual one mostly."""
    if not level:
        return random.choice((*sizes[:1] * 3, *sizes))
    return _size(level) or _small(level, sizes, random)


def _size(level: str) -> str:
    """`2M` of `pde 2M`."""
    return level.partition(" ")[2]


def _small(level: str, sizes: tuple[str, ...], random: Random) -> str:
    """A size of pages with which an entry of that level is one that leads to a table, or a PTE."""
    shift = {"pte": 12, "pde": 20, "pdpte": 29}.get(level, 64)
    fitting = [size for size in sizes if PAGE_SHIFTS[size] <= shift]
    return random.choice(fitting or sizes[:1])


def fits(cell: Cell, key: Key) -> bool:
    """Whether the cell can be aimed at in that world."""
    guest, nested, guest_page, nested_page, table_page = key
    if not cell.mode:
        rule = cell.rule.removeprefix("vmrun.")
        if rule == "pdpe":
            return guest == "PAE" and nested_page == NO_NESTED_PAGING
        return rule in _REFUSED and (MODES[guest].long or rule not in _ONLY_LONG) and not (
            rule in ("ncr3-mbz", "g-pat") and nested_page == NO_NESTED_PAGING)
    mode = f"{OFF if guest in ('off', 'real') else guest}/{NONE if nested_page == NO_NESTED_PAGING else nested}"
    if cell.mode != mode:
        return False
    leaves = cell.level.split("/") if cell.rule == "reached" else [cell.level]
    if cell.dimension in ("guest", "both") and not mode.startswith(OFF) and not _on(leaves[0], guest_page):
        return False
    if cell.dimension in (NESTED_PAGE, "both") and not mode.endswith(NONE) and not _on(leaves[-1], nested_page):
        return False
    return not (cell.dimension == NESTED_TABLE and not _on(cell.level, table_page))


def _on(level: str, page: str) -> bool:
    """Whether a walk to a page of that size reads such an entry."""
    if not level:
        return True
    if _size(level):
        return _size(level) == page
    return {"pte": 12, "pde": 20, "pdpte": 29}.get(level, 64) >= PAGE_SHIFTS[page]


def aim(cell: Cell, draw: Draw) -> Aim:
    """The recipe for a cell, in a world that `fits` it."""
    out = Aim(cpl=3 if "user" in cell.outcome.split() else 0)
    kind = next((kind for kind in ("fetch", "write", "read") if kind in cell.outcome), "read")
    family, _, rule = cell.rule.partition(".")
    if family == "vmrun":
        _refused(out, rule, draw)
    elif family == "exit":
        _exit(out, rule, cell.outcome, draw)
    elif family == "canonical":
        kind = (draw.one(("pop",)) if kind == "read" else "push") if rule == "stack" else kind
        out.probes = [Probe(kind, f"{draw.edge():#x}")]
    elif family == "ad":
        _accessed(out, cell, draw)
    else:
        if family in ("guest", "nested"):
            kind = _walk(out, cell, rule, kind, draw)
        if not out.probes:
            out.probes = [draw.access(kind, "a")]
    out.probes = [probe for probe in out.probes if draw.fits(probe.kind)]
    return out


def _entry(cell: Cell, draw: Draw) -> str:
    """The name of an entry at the cell's level."""
    level = cell.level.partition(" ")[0]
    if cell.dimension == NESTED_TABLE:
        names = [name for name in draw.ground.tables if name.endswith(f".{level}")]
        return draw.one(names) if names else ""
    name = f"{'nested' if cell.dimension == NESTED_PAGE else 'guest'}.a.{level}"
    return name if name in draw.ground.world.entries else ""


def _leaf(dimension: str, draw: Draw) -> str:
    """The entry that maps page a."""
    names = [name for name in draw.ground.guest + draw.ground.nested if name.startswith(f"{dimension}.a.")]
    return names[-1] if names else ""


def _walk(out: Aim, cell: Cell, rule: str, kind: str, draw: Draw) -> str:
    """A rule of the walk; returns the kind of access that it takes."""
    own, name = cell.dimension == "guest", _entry(cell, draw)
    if "CR0.WP=0" in cell.outcome:
        out.ops.append(VmcbOp("cr0", Change(clear=("wp",))))
        kind = "write"
    if rule in _RIGHTS and name:
        out.ops.append(EntryOp(name, _RIGHTS[rule]))
    elif rule == "reserved" and name:
        reason = cell.outcome.partition(" ")[2]
        if reason == "NX":
            off = Change(clear=("nxe",))
            out.ops.append(VmcbOp("efer", off) if own else HostOp("efer", off))
        if reason in _RESERVED:
            bit = "bit21" if reason == "low frame bits" and cell.level == "pde 4M" else draw.one(_RESERVED[reason])
            out.ops.append(EntryOp(name, Change(set=(bit,))))
    elif rule == "smep":
        out.ops.append(VmcbOp("cr4", Change(set=("smep",))))
        kind = "fetch"
    elif rule == "smap":
        out.ops.append(VmcbOp("cr4", Change(set=("smap",))))
        if "AC=1" in cell.outcome:
            draw.aligned = True
            out.ops.append(VmcbOp("rflags", Change(value=0x40002)))
        elif "implicit" in cell.outcome:
            leaf = [name for name in draw.ground.system if name.startswith("guest.gdt.")]
            out.ops += [EntryOp(name, Change(set=("us",))) for name in leaf[-1:]]
            out.probes = [Probe("lar", value=0x28)]
    elif rule == "key":
        denied = 0x4 if "AD" in cell.outcome or "fetch" in cell.outcome or "supervisor page" in cell.outcome else 0x8
        out.ops += [VmcbOp("cr4", Change(set=("pke",))), HostOp("pkru", Change(value=denied))]
        out.ops.append(EntryOp(name, Change(set=("bit59",), clear=("us",) if "page" in cell.outcome else ())))
    return kind


def _accessed(out: Aim, cell: Cell, draw: Draw) -> None:
    """Accessed and dirty bits: those of a to d are clear at first."""
    kind = cell.outcome.rpartition(" ")[2] if " by " in cell.outcome else draw.one(("read", "write"))
    if cell.outcome.startswith("D"):
        kind = "write"
    if cell.outcome.endswith("before a fault"):
        name, lower = _entry(cell, draw), _leaf("nested", draw)
        for candidate in (_leaf("guest", draw), lower) if cell.dimension != "guest" else (lower, _leaf("guest", draw)):
            if candidate and candidate != name:
                out.ops.append(EntryOp(candidate, Change(clear=("p",))))
                break
    name = _entry(cell, draw)
    if name and cell.outcome.startswith("D") and draw.chance(0.5):
        out.ops.append(EntryOp(name, Change(set=("a",))))
    out.probes = [draw.access(kind, "a")]


def _refused(out: Aim, rule: str, draw: Draw) -> None:
    out.last = True
    out.probes = [draw.access()]
    if rule == "pdpe":
        out.ops.append(EntryOp("guest.a.pdpte", Change(set=(draw.one(_RESERVED["low bits"]),))))
    else:
        name, change = draw.one(_REFUSED[rule])
        out.ops.append(VmcbOp(name, change))


def _exit(out: Aim, rule: str, outcome: str, draw: Draw) -> None:
    """A rule of #VMEXIT."""
    if rule == "intercept":
        kinds = [kind for kind in _BY_EXIT.get(outcome, []) if draw.fits(kind)]
        if kinds:
            kind = draw.one(kinds)
            out.ops, out.probes = draw.intercept(kind), [draw.argued(kind)]
            for op in out.ops[1:]:  # the bit of the map that the probe goes by
                if isinstance(op, EntryOp):
                    out.ops.append(EntryOp(f"{op.entry.partition('.')[0]}.{out.probes[0].target}", op.change))
        elif outcome == "VMEXIT_CR0_SEL_WRITE":
            out.ops = [VmcbOp(_SELECTIVE[0], Change(set=(_SELECTIVE[1],)))]
            out.probes = [Probe("wrcr0", value="&vmcb.cr0-wp")]
    elif rule == "exception":
        out.probes = [Probe(_EXCEPTIONS[outcome])] if outcome in _EXCEPTIONS else []
    elif rule == "privileged":
        out.cpl, out.probes = 3, [Probe(draw.one(("rdcr0", "rdcr3", "rddr7")))]
    elif rule == "host-dr7":
        out.ops.append(HostOp("dr7", Change(value=0x402)))
    elif rule == "delivered":
        _delivered(out, outcome, draw)
    if not out.probes:
        out.probes = [draw.access(page="a")]


def _delivered(out: Aim, outcome: str, draw: Draw) -> None:
    what, _, cut = outcome.partition(" cut short by VMEXIT_")
    if what in _EVENTS:
        out.ops.append(VmcbOp("eventinj", Change(value=draw.one(_EVENTS[what]))))
    elif what == "#PF":
        out.ops.append(VmcbOp("intercept_exceptions", Change(clear=("pf",))))
        out.ops.append(EntryOp(_leaf("guest", draw), Change(clear=("p",))))
        out.probes = [draw.access("read", "a")]
    else:
        out.ops.append(VmcbOp("intercept_exceptions", Change(clear=("gp",))))
        out.cpl, out.probes = 3, [Probe("rdcr0")]
    part = draw.one(("idt", "stack", "gdt"))
    dimension = "nested" if cut == "NPF" else "guest"
    if cut:
        if out.cpl and part == "stack":
            part = "tss"
        out.ops.append(EntryOp(f"{dimension}.{part}.pte", Change(clear=("p",))))
