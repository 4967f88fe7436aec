"""How the command is used: an example or two in each command's help, and completion in shells."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any, Final

from harness import places
from harness.options import LIBRARY
from harness.scenario import files
from harness.target import AUTO, MACHINES

SHELLS: Final = ("bash", "zsh", "fish")

EXAMPLES: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "": (
        ("doctor", "what works here, and what mends the rest"),
        ("run", "the whole library, on the best machine there is: some minutes"),
        ("run --help", "how to test a build of your own"),
    ),
    "run": (
        ("-k first-light --machine tcg", "one scenario, on QEMU's own emulation: the quickest try"),
        ("--kernel build/ --html result.html", "your KVM, in an AMD host that QEMU plays; the results as a page"),
        ("my-scenario.toml --bundles found", "what is new is shrunk, and written as bundles"),
    ),
    "list": (
        ("-k 'nested and write'", "scenarios with both words in their names"),
        ("-k sweeps", "sweeps, with the number of their cases"),
    ),
    "coverage": (
        ("result.json", "of an earlier `run --json result.json`"),
        ("--machine tcg", "runs the library first"),
    ),
    "fuzz": (
        ("--machine tcg --budget 20s", "a short look"),
        ("--budget 12h --journal night.journal --bundles found", "again after a stop, and it goes on"),
    ),
    "replay": (
        ("found/NAME.twin", "on a machine like the one it was found on"),
        ("found/NAME.twin --kernel bzImage", "is it there too?"),
        ("found/NAME.twin --export-c test", "a C test of it, which needs nothing of twinwalk"),
    ),
    "explain": (
        ("found/NAME.twin", "a bundle's finding: walks and VMCB"),
        ("qmp:vm.qmp 0x3c5a9d7e6000 --vmcb 0x20000", "in a running QEMU, by its QMP socket"),
        ("memory.bin 0x3c5a9d7e6000 --vmcb 0x20000 --svg walk.svg", "in a dump, by L2's VMCB"),
        ("dump.elf 0x3c5a9d7e6000 --cr3 0x3140002000 --ncr3 0x1000", "by CR3 and nCR3"),
    ),
    "fetch": (
        ("--list", "what there is"),
        ("qemu 10.0", "for `run --qemu 10.0`"),
    ),
    "matrix": (
        ("--qemu 7.2,10.0 --html matrix.html", "two QEMUs, as a page"),
        ("--kernel 6.1,6.12 -k ad/ --budget 0", "two KVMs, a part of the library, no sweeps"),
    ),
    "bisect": (
        ("found/NAME.twin --qemu 7.2..10.0", "since which QEMU a finding shows"),
        ("walk/table-read-only --kernel 6.1..6.12", "since which KVM a scenario of the library differs"),
    ),
    "observe": (
        ("linux", "the distribution's KVM as L1, and in it a Linux L2"),
        ("--kernel my-hypervisor.elf --seconds 60", "any image that QEMU's -kernel takes"),
    ),
    "campaign": (
        ("--scheduler tcp://head:8786 --budget 1000000 --journal fleet.journal", "a million cases"),
        ("--hosts amd-hosts --machine kvm --fuzz 0..999", "programs of 1,000 seeds"),
    ),
    "doctor": (("", "everything"), ("--kernel build/", "with a kernel of your own")),
    "bench": (("--machine tcg --pairs 10000", "a short one"),),
    "completion": (("bash", "to be read by the shell: eval \"$(twinwalk completion bash)\""),),
}
"""By command: arguments, and what they do."""


class Help(argparse.HelpFormatter):
    """As argparse's own, but lines that begin with blanks stay as they are: examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        return "\n\n".join(part if part.startswith("  ") else super(Help, self)._fill_text(part, width, indent)
                           for part in parts)


def add_examples(commands: Any) -> None:
    """To the help of each sub-command."""
    for name, parser in commands.choices.items():
        parser.formatter_class = Help
        parser.epilog = "\n\n".join(filter(None, [parser.epilog, "examples:", "\n".join(examples(name))]))


def examples(name: str) -> Iterator[str]:
    """Of one command: each is what one types, and behind it what it does."""
    lines = [(" ".join(filter(None, [places.command(), name, text])), what) for text, what in EXAMPLES[name]]
    width = max(len(text) for text, _ in lines)
    for text, what in lines:
        yield f"  {text:{width}}  # {what}"


def add(commands: Any) -> None:
    """`completion`, to argparse's sub-commands."""
    parser = commands.add_parser("completion", help="print a script that makes a shell complete commands and options")
    parser.add_argument("shell", choices=SHELLS, help="which shell")
    parser.set_defaults(command=_completion)


def _completion(options: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["twinwalk"], shell=options.shell))
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Where a shell asks for it, answers and ends the process."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    for action in list(_actions(parser)):
        if action.dest == "machine":
            action.completer = lambda **_: (AUTO, *MACHINES)  # type: ignore[attr-defined]
        elif action.dest == "expression":
            action.completer = lambda **_: _families()  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _actions(sub)


def _families() -> Iterator[str]:
    """Scenarios by file: reading them all would take seconds."""
    for path in LIBRARY.rglob("*.toml"):
        if files.ERRATA_FOLDER not in path.parts:
            yield str(path.relative_to(LIBRARY).with_suffix(""))
