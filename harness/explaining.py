"""`twinwalk explain`: the two-dimensional walk of an address, entry by entry: of a bundle, a dump, a live machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from harness.errors import UsageError
from harness.lockstep import audited
from harness.lockstep.compare import Divergence
from harness.lockstep.observe import judge_again
from harness.lockstep.prediction import Prediction
from harness.lockstep.rehearse import rehearse
from harness.machine.dump import Dump
from harness.machine.live import SCHEME, Live
from harness.model.access import Access
from harness.model.given import FORMATS, OFF, by_cr3, by_vmcb
from harness.model.memory import Memory
from harness.model.registers import Cpu
from harness.model.vmcb import NP_ENABLE, Vmcb
from harness.model.vmrun import Host, load, paging
from harness.model.walk import Paging, Walk, translate
from harness.options import count, number
from harness.replay import models
from harness.report import audits, output, stops, svg, terminal
from harness.report.bundle import MANIFEST, Bundle, read
from harness.report.findings import Finding, findings
from harness.report.styled import harmless, line, wrap
from harness.report.walks import alone, by_itself
from harness.scenario.ops import RunOp
from harness.wire.stop import ENTER

_ACCESSES: Final = {"read": Access(), "write": Access(write=True), "fetch": Access(fetch=True)}
_VMCB: Final = 4096


def add(commands: Any) -> None:
    """The command, to argparse's sub-commands."""
    parser = commands.add_parser(
        "explain", help="draw the two-dimensional walk of an address: from a bundle, a dump, a live machine",
        epilog="exit codes: 0 it was drawn, 2 wrong use, a damaged file, or a walk that leads out of memory.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE",
                        help="a bundle, NAME.twin; a file of QEMU's `pmemsave` from 0 on, or of `dump-guest-memory`; "
                             "or qmp:PATH, the QMP socket of a QEMU that is running")
    parser.add_argument("gva", type=number, nargs="?", metavar="GVA",
                        help="the address to translate; a bundle without it: its finding")
    parser.add_argument("--vmcb", type=number, metavar="SPA", help="where L2's VMCB is")
    parser.add_argument("--cr3", type=number, metavar="GPA", help="L2's CR3, in place of --vmcb")
    parser.add_argument("--ncr3", type=number, metavar="SPA",
                        help="nCR3; without it --cr3 is of a walk of one dimension")
    parser.add_argument("--guest", choices=[*FORMATS, OFF], default="4-level",
                        help="with --cr3, the format of L2's tables (default: 4-level)")
    parser.add_argument("--nested", choices=[*FORMATS], default="4-level",
                        help="the format of L1's nested table (default: 4-level)")
    parser.add_argument("--maxphyaddr", type=number, default=52, metavar="BITS",
                        help="physical address bits: those above are reserved (default: 52)")
    parser.add_argument("--vcpu", type=count, metavar="N",
                        help="of a live machine without --vmcb and --cr3: whose registers count (default: 0)")
    parser.add_argument("--access", choices=[*_ACCESSES], default="read", help="what L2 does there (default: read)")
    parser.add_argument("--user", action="store_true", help="at CPL 3 (default: CPL 0)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the walk as a drawing")
    parser.set_defaults(command=_explain)


def _explain(options: argparse.Namespace) -> int:
    if options.svg:
        output.check_writable(options.svg, "--svg")
    access = _ACCESSES[options.access]._replace(user=options.user)
    screen = terminal.Screen()
    if str(options.source).startswith(SCHEME):
        finding = _of_machine(options, access, screen)
        screen.show(alone(finding, screen.width))
    elif options.vcpu is not None:
        raise UsageError("--vcpu is for a live machine: qmp:PATH")
    elif not options.source.exists():
        raise UsageError(f"{options.source}: no such file or folder: give a bundle, a dump, or qmp:PATH")
    elif stops.is_one(options.source):
        finding = _of_stops(options.source, stops.read(options.source), options, access, screen)
    elif audits.is_one(options.source):
        finding = _of_audit(options.source, audits.read(options.source), options, screen)
    elif (options.source / MANIFEST).exists() or options.source.is_dir():
        finding = _of_bundle(options.source, read(options.source), options, access, screen)
    else:
        finding = _of_dump(options.source, options, access)
        screen.show(alone(finding, screen.width))
    if options.svg:
        output.write(options.svg, svg.text(finding))
    return 0


def _of_dump(path: Path, options: argparse.Namespace, access: Access) -> Finding:
    if options.gva is None or (options.vmcb is None) == (options.cr3 is None):
        raise UsageError("explain: of a dump give an address, and either --vmcb or --cr3 (and --ncr3)")
    return _in_memory(Dump(path), options, access)


def _of_machine(options: argparse.Namespace, access: Access, screen: terminal.Screen) -> Finding:
    """Of one that is running: by a VMCB in its memory, by CR3 and nCR3, or by the registers of a vCPU."""
    if options.gva is None or (options.vmcb is not None and options.cr3 is not None):
        raise UsageError("explain: of a live machine give an address, and at most one of --vmcb and --cr3")
    with Live(Path(str(options.source).removeprefix(SCHEME))) as machine:
        if options.vmcb is not None or options.cr3 is not None:
            return _in_memory(machine, options, access)
        registers = machine.registers(options.vcpu or 0)
        said = ", ".join(f"{name.upper()} {value:#x}" for name, value in registers.items())
        screen.show(wrap(said, screen.width, f"vCPU {options.vcpu or 0}  "))
        vmcb = Vmcb(Memory.over(memoryview(bytearray(_VMCB))), 0)
        for name, value in registers.items():
            vmcb[name] = value
        if options.ncr3 is not None:
            vmcb["np_control"], vmcb["ncr3"] = NP_ENABLE, options.ncr3
        else:
            screen.show([line("one dimension: if L2 runs there, give --ncr3")])
        screen.show([line("")])
        return _in_memory(machine, options, access, vmcb)


def _in_memory(
    memory: Dump | Live, options: argparse.Namespace, access: Access, vmcb: Vmcb | None = None
) -> Finding:
    """By `vmcb`, or what the options say."""
    if not 32 <= options.maxphyaddr <= 52:
        raise UsageError(f"--maxphyaddr {options.maxphyaddr}: processors have 32 to 52")
    cpu = Cpu(options.maxphyaddr)
    try:
        if options.vmcb is not None:
            vmcb = Vmcb(Memory.over(memoryview(bytearray(memory.read(options.vmcb & -8, _VMCB)))), 0)
            if not vmcb["np_control"] & NP_ENABLE and not vmcb["cr3"]:
                raise UsageError(f"--vmcb {options.vmcb:#x}: there is no VMCB: NP_ENABLE and CR3 are 0")
        by = by_vmcb(vmcb, options.nested, cpu=cpu) if vmcb is not None else (
            by_cr3(options.cr3, options.ncr3, options.guest, options.nested, cpu=cpu))
        return by_itself(translate(by, memory, options.gva, access))
    except IndexError as reason:
        raise UsageError(f"{options.source}: the walk leads out of memory: {reason}: are the addresses right?"
                         ) from None


def _of_stops(
    path: Path, bundle: stops.Observed, options: argparse.Namespace, access: Access, screen: terminal.Screen
) -> Finding:
    """A finding of `observe`, judged once more by the model alone; or a walk by L2's state at its last stop."""
    if options.vmcb is not None or options.cr3 is not None or options.ncr3 is not None:
        raise UsageError("--vmcb, --cr3 and --ncr3 are for dumps: a bundle has its own")
    about, evidence = bundle.about, bundle.evidence
    if options.gva is None:
        same = _again(about, bundle.walks, judge_again(about.observed, evidence, bundle.cpu), screen)
        if same is None and options.svg:
            raise UsageError(f"{path}: this version's model does not find it any more: there is nothing to draw")
        return same or Finding("", -1, -1, ())
    *_, (memory, stop) = evidence.again()
    entered = evidence.moments[0].stop if stop.kind != ENTER else stop
    known = evidence.known()
    vmcb, host = Vmcb(memory, entered.host["rax"]), Host(
        entered.host["cr0"], entered.host["cr4"], entered.host["efer"], pat=0, dr7=0)
    walk = translate(paging(load(vmcb, host), vmcb, host, bundle.cpu), memory.words, options.gva, access)
    if missing := next((step[3] for step in walk.trail if step[3] & -4096 not in known), None):
        raise UsageError(f"{path}: the walk leads to sPA {missing:#x}: the bundle has the pages of its finding alone")
    finding = by_itself(walk)
    screen.show(alone(finding, screen.width))
    return finding


def _again(about: stops.About, walks: str, judged: list[Divergence], screen: terminal.Screen) -> Finding | None:
    """Show a finding as it was told, and whether it is among those that the model judges now."""
    screen.show([line(text) for text in harmless(walks).splitlines()])
    signature = about.check, about.field, about.rule
    found = [one for every in judged for one in findings([every])]
    same = next((one for one in found if one.signature == signature), None)
    other = f"another finding: {found[0].signature}" if found else "nothing"
    screen.show([line(""), line(f"judged again by the model alone: {'the same finding' if same else other}")])
    return same


def _of_audit(path: Path, bundle: audits.Audited, options: argparse.Namespace, screen: terminal.Screen) -> Finding:
    """A finding in the tables of the KVM under L1, judged once more."""
    if options.gva is not None or options.vmcb is not None or options.cr3 is not None or options.ncr3 is not None:
        raise UsageError(f"{path}: it is about an entry of KVM's tables, and has what leads to that alone: no address, "
                         "--vmcb, --cr3 and --ncr3 go with it")
    if options.svg:
        raise UsageError(f"{path}: it is about an entry of KVM's tables, and no walk of L2's: there is nothing to draw")
    try:
        judged = audited.judge_again(bundle.about.observed, bundle.evidence, bundle.cpu)
    except (ValueError, IndexError) as reason:
        raise UsageError(f"{path}: what it says of KVM makes no sense: {reason}") from None
    return _again(bundle.about, bundle.walks, judged, screen) or Finding("", -1, -1, ())


def _of_bundle(
    path: Path, bundle: Bundle, options: argparse.Namespace, access: Access, screen: terminal.Screen
) -> Finding:
    """What the bundle's finding is, or a walk in the tables as its VMRUN leaves them; the model runs the scenario."""
    if options.vmcb is not None or options.cr3 is not None or options.ncr3 is not None:
        raise UsageError("--vmcb, --cr3 and --ncr3 are for dumps: a bundle has its own")
    if options.gva is None:
        screen.show([line(text) for text in harmless(bundle.walks).splitlines()])
        for record in bundle.records:
            if bundle.about.divergences and record["op"] == bundle.about.divergences[0]["op"]:
                fields = ", ".join(f"{name} {value}" for name, value in record["vmcb"].items())
                screen.show([line(""), *wrap(harmless(fields), screen.width, f"VMCB {record['kind']}  ")])
        if not options.svg:
            return Finding("", -1, -1, ())
    if not bundle.about.divergences:
        raise UsageError(f"{path}: its machine was lost: there is no walk in it")
    walk, after = _walk_in(path, bundle, options.gva, access)
    if options.gva is None:
        return _finding(bundle, walk, after)
    finding = by_itself(walk)
    screen.show(alone(finding, screen.width))
    return finding


def _walk_in(path: Path, bundle: Bundle, gva: int | None, access: Access) -> tuple[Walk, tuple[int, ...]]:
    """The walk of the finding's probe, or of `gva` in the tables as that VMRUN leaves them; and its entries after it,
    by the quadword."""
    op, probe = bundle.about.divergences[0]["op"], max(0, bundle.about.divergences[0]["probe"])
    compiler, twin = models(path, bundle)
    runs = iter([n for n, one in enumerate(bundle.scenario.ops) if isinstance(one, RunOp)])
    now = -1
    found: list[tuple[Walk, tuple[int, ...]]] = []

    def take(walk: Walk) -> None:
        found.append((walk, tuple(twin.memory.words[step.address >> 3] for step in walk.steps)))

    def see(prediction: Prediction) -> None:
        nonlocal now
        now = next(runs) if prediction.first_probe == 0 else now
        if now != op or not prediction.first_probe <= probe <= prediction.next_probe:
            return
        if gva is None:
            if probe in prediction.walks:
                take(prediction.walks[probe])
            return
        paging: Paging | None = prediction.under[probe][0] if probe in prediction.under else prediction.paging
        if paging is not None:
            take(translate(paging, twin.memory.words, gva, access))

    rehearse(twin, compiler.compile(bundle.scenario), see, expectations=False)
    if not found:
        raise UsageError(f"{path}: L2 does not come to the probe of its finding, or that one is no access to memory")
    return found[0]


def _finding(bundle: Bundle, walk: Walk, after: tuple[int, ...]) -> Finding:
    """That of the bundle, with the model's walk. What the machine had otherwise in its entries is among what differs;
    the rest it left as the model does."""
    made = [Divergence(bundle.scenario.name, one["op"], one["probe"], str(one.get("check")), one["field"],
                       _value(one.get("expected")), _value(one.get("observed")), str(one.get("rule")), walk, after)
            for one in bundle.about.divergences]
    return findings(made)[0]


def _value(text: object) -> int | str:
    """A value as harness.report.jsonfile writes it."""
    try:
        return int(str(text), 16) if str(text).startswith("0x") else str(text)
    except ValueError:
        return str(text)
