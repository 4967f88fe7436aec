"""What --help and completion offer: examples that parse, options that there are, docs/commands.md as it must be."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from harness import cli, command_doc, places, usage
from harness.cli import parser


def test_the_page_is_up_to_date() -> None:
    assert command_doc.PAGE.read_text(encoding="utf-8") == command_doc.page(), (
        f"docs/commands.md is out of date: {command_doc.COMMAND}")


@pytest.mark.parametrize("name", usage.EXAMPLES)
def test_examples_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, what in usage.EXAMPLES[name]:
        given = [*([name] if name else []), *shlex.split(arguments)]
        if "--help" in given:
            with pytest.raises(SystemExit, match="0"):
                parser().parse_args(given)
        else:
            parser().parse_args(given)
        assert what


@pytest.mark.parametrize("name", usage.EXAMPLES)
def test_they_are_in_the_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line whole, however narrow the terminal."""
    with pytest.raises(SystemExit):
        cli.main([*([name] if name else []), "--help"])
    shown = capsys.readouterr().out
    assert all(line in shown for line in usage.examples(name))
    assert places.command() == "./twinwalk" and "./twinwalk" in shown


def completed(line: str) -> list[str]:
    """What a shell would be told of `line`, with the cursor at its end."""
    read, write = os.pipe()
    try:
        environment = os.environ | {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)),
                                    "COMP_TYPE": "9", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash",
                                    "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
        script = f"{shlex.quote(sys.executable)} -m harness.cli 8>&{write} 9>/dev/null"
        subprocess.run(["bash", "-c", script], env=environment, pass_fds=[write], timeout=120, check=True)
        os.close(write)
        write = -1
        with open(read, encoding="utf-8", closefd=False) as answer:
            return answer.read().split("\n")
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)


@pytest.mark.parametrize(
    ("line", "words"),
    [("twinwalk ru", {"run"}), ("twinwalk run --bud", {"--budget"}), ("twinwalk run --machine kvm", {"kvm-on-tcg"}),
     ("twinwalk list -k walk/table-read", {"walk/table-read-only"})],
)
def test_completion(line: str, words: set[str]) -> None:
    assert words <= {word.strip() for word in completed(line)}


@pytest.mark.parametrize("shell", usage.SHELLS)
def test_the_script_for_a_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    assert re.search(r"\btwinwalk\b", capsys.readouterr().out)
