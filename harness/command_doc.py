"""docs/commands.md: every command with its options, as `--help` has them.

    python -m harness.command_doc        # writes it anew
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from harness import cli, usage

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
COMMAND: Final = "python -m harness.command_doc"

_TOP: Final = f"""\
<!-- Made by `{COMMAND}`: change harness/cli.py or the module of the command. -->

# Commands

What `--help` says, in one page. Every command takes `-h`. In a checkout the command is `./twinwalk`, which sets up what
is missing; installed from a wheel it is `twinwalk`.

Exit codes: 0 agreed, or known errata only; 1 a new divergence; 2 wrong use, or a bad input file; 3 a machine was lost,
or could not be started. Where a command has others, it is said there.

Completion in a shell: `eval "$(twinwalk completion bash)"` (or `zsh`, `fish`), in the shell's start file.
"""


def page() -> str:
    """The whole text."""
    commands = next(one for one in cli.parser()._actions if isinstance(one, argparse._SubParsersAction))
    parts = [_TOP]
    for action in commands._choices_actions:
        parts.append("\n".join(_command(action.dest, action.help or "", commands.choices[action.dest])))
    return "\n".join(parts)


def _command(name: str, about: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    yield f"{about[0].upper()}{about[1:]}."
    said = (parser.epilog or "").partition("examples:")[0].strip()
    if said:
        yield from textwrap.wrap(f"{said[0].upper()}{said[1:]}", 120, break_long_words=False, break_on_hyphens=False)
    yield ""
    yield from (line.replace("  ./twinwalk", "    ./twinwalk", 1) for line in usage.examples(name))
    yield ""
    rows = [(_names(one), " ".join((one.help or "").split())) for one in parser._actions if one.dest != "help"]
    if rows:
        yield "| option | what |"
        yield "| --- | --- |"
        yield from (f"| {names} | {what.replace('|', chr(92) + '|')} |" for names, what in rows)
        yield ""


def _names(action: argparse.Action) -> str:
    """An option as one types it, or the name of what stands without one."""
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
    if not action.option_strings:
        return f"`{value or action.dest}`"
    if action.nargs == "?":
        value = f"[{value}]"
    names = ", ".join(f"`{name}{f' {value}' if value else ''}`" for name in action.option_strings)
    return names.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
