"""The command line: `twinwalk run`, `list`, `doctor`, `bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from harness.errors import TwinwalkError, UsageError
from harness.lockstep import errata as errata_files
from harness.run import Outcome, Target, run
from harness.scenario import files
from harness.scenario.ops import Scenario

LIBRARY: Final = Path(__file__).resolve().parents[1] / "scenarios"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: see docs/exit-codes in the README."""
    options = _parser().parse_args(argv)
    try:
        return int(options.command(options))
    except TwinwalkError as error:
        print(f"twinwalk: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="twinwalk", description="Checks nested paging in lockstep with a model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    runner = commands.add_parser("run", help="run scenarios in lockstep")
    _selection(runner)
    _target(runner)
    runner.add_argument("--strict", action="store_true", help="count known errata as divergences")
    runner.add_argument("--fail-fast", action="store_true", help="stop at the first new divergence")
    mode = runner.add_mutually_exclusive_group()
    mode.add_argument("--lockstep", dest="pipelined", action="store_false", default=False,
                      help="L1 waits for the checker at every record (the default)")
    mode.add_argument("--pipelined", action="store_true", help="the checker follows behind")
    runner.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    runner.add_argument("--junit", type=Path, metavar="FILE", help="write the results as JUnit XML")
    runner.set_defaults(command=_run)
    lister = commands.add_parser("list", help="list scenarios")
    _selection(lister)
    lister.set_defaults(command=_list)
    return parser


def _selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE", help="scenario files or folders (default: all)")
    parser.add_argument("-k", dest="expression", default="", metavar="EXPR",
                        help="only scenarios whose name contains EXPR; `and`, `or`, `not` combine")


def _target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machine", choices=["tcg"], default="tcg", help="where L1 runs")
    parser.add_argument("--qemu", metavar="PATH", help="the QEMU to test")
    parser.add_argument("--cpu", default="max", metavar="MODEL", help="QEMU's CPU model (default: max)")
    parser.add_argument("--qemu-arg", action="append", default=[], metavar="ARG", help="a further argument for QEMU")


def _select(options: argparse.Namespace) -> list[Scenario]:
    found = [s for path in files.find(options.paths or [LIBRARY]) for s in files.read(path)]
    chosen = [s for s in found if _matches(options.expression, s.name)]
    if not chosen:
        raise UsageError(f"-k {options.expression!r} matches none of {len(found)} scenarios")
    return chosen


def _matches(expression: str, name: str) -> bool:
    """`a and not b or c` over parts of a name; `and` binds closer than `or`."""
    def term(words: list[str]) -> bool:
        negate = words[:1] == ["not"]
        rest = words[1:] if negate else words
        if len(rest) != 1:
            raise UsageError(f"-k: cannot make sense of {expression!r}; write e.g. 'nested and not write'")
        return (rest[0] in name) != negate

    if not expression.strip():
        return True
    groups = [[]]  # type: list[list[list[str]]]
    words: list[str] = []
    for word in [*expression.split(), "or"]:
        if word in ("and", "or"):
            groups[-1].append(words)
            words = []
            if word == "or":
                groups.append([])
        else:
            words.append(word)
    return any(all(term(t) for t in group) for group in groups[:-1])


def _run(options: argparse.Namespace) -> int:
    scenarios = _select(options)
    errata = errata_files.load(LIBRARY / files.ERRATA_FOLDER)
    target = Target(options.machine, options.qemu, options.cpu, tuple(options.qemu_arg))
    outcome = run(target, scenarios, errata, options.pipelined, options.fail_fast, outcome=Outcome())
    for r in outcome.results:
        if r.lost: print(r.scenario, r.lost)
        for d in r.divergences:
            f=lambda x: hex(x) if isinstance(x,int) else x
            if not d.erratum: print(r.scenario,d.op,d.probe,d.check,d.field,'want',f(d.expected),'got',f(d.observed),d.rule,d.erratum)
    print(len(outcome.results), sum(r.vmruns for r in outcome.results), outcome.new(), outcome.seconds, outcome.first_verdict)
    return outcome.exit_code(options.strict)


def _list(options: argparse.Namespace) -> int:
    for scenario in _select(options):
        print(f"{scenario.name:40} {scenario.title} ({scenario.manual})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
