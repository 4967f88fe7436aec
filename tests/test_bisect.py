"""`twinwalk bisect`: where along a sequence of versions a finding begins or ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import bisect, cli
from harness.bisect import Verdict, between, find
from harness.errors import UsageError
from harness.machine import qemu
from harness.machine.versions import Fetched
from tests.conftest import ROOT
from tests.machine.test_versions import put
from tests.scenario.texts import run, text

SEVERAL = [Fetched("qemu", (number, 0), Path(f"/{number}")) for number in range(12)]


def search(pattern: str) -> tuple[bisect.Edge, list[int]]:
    """`pattern` has a letter for each version: + shows, - does not, ? cannot be tested. Returns the edge, and the
    versions that were tested."""
    tested: list[int] = []

    def test(one: Fetched) -> Verdict:
        tested.append(one.version[0])
        return Verdict({"+": True, "-": False, "?": None}[pattern[one.version[0]]], "")

    return find(SEVERAL[: len(pattern)], test), tested


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("-+", "it shows since 1.0, and not in 0.0"),
        ("+-", "it shows until 0.0, and not in 1.0"),
        ("----++++", "it shows since 4.0, and not in 3.0"),
        ("-+++++++++++", "it shows since 1.0, and not in 0.0"),
        ("+++++++++++-", "it shows until 10.0, and not in 11.0"),
        ("--?++", "it shows since 3.0, and not in 1.0; between them 2.0 cannot be tested"),
        ("-????+", "it shows since 5.0, and not in 0.0; between them 1.0, 2.0, 3.0, 4.0 cannot be tested"),
        ("??--++??", "it shows since 4.0, and not in 3.0"),
        ("-?-?+?+", "it shows since 4.0, and not in 2.0; between them 3.0 cannot be tested"),
    ],
)
def test_the_edge_is_found(pattern: str, text: str) -> None:
    edge, tested = search(pattern)
    assert (edge.code, edge.text) == (0, text)
    assert len(tested) == len(set(tested)), "no version is tested twice"


def test_few_are_tested() -> None:
    assert len(search("-----------+")[1]) <= 6


@pytest.mark.parametrize(
    ("pattern", "code", "text"),
    [("++", 1, "it shows at both ends"), ("--?-", 1, "it does not show at both ends"),
     ("???", 3, "none of these versions can be tested")],
)
def test_no_edge(pattern: str, code: int, text: str) -> None:
    edge, _ = search(pattern)
    assert edge.code == code and edge.text.startswith(text)


def test_a_range_has_what_was_fetched_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "twinwalk" / "versions"
    for name, version in (("a", "5.2.0"), ("b", "7.9.1"), ("c", "10.0.2"), ("d", "10.0.13"), ("e", "11.1.3")):
        put(cache, f"qemu-{version}+{name}", version)
    put(cache, "qemu-10.0.2+again", "10.0.2")
    assert [one.version for one in between("qemu", "7.9", "10.0")] == [(7, 9, 1), (10, 0, 2), (10, 0, 13)]
    with pytest.raises(UsageError, match="write the older one first"):
        between("qemu", "11.1", "7.9")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["walk/sizes"], "say which versions"),
        (["walk/sizes", "--qemu", "7.2..11.1", "--kernel", "6.1"], "say which versions"),
        (["walk/no-such", "--qemu", "7.2"], "walk/no-such is no bundle, no scenario file, and no scenario"),
    ],
)
def test_wrong_use(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bisect", *words]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.guest
class TestOneVersion:
    """Exit codes as `git bisect run` wants them."""

    def test_it_does_not_show(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "agrees.toml"
        path.write_text(text(run("read a")))
        assert cli.main(["bisect", str(path), "--qemu", qemu.find(None)]) == 0
        assert "does not show" in capsys.readouterr().out

    def test_it_shows(self, capsys: pytest.CaptureFixture[str]) -> None:
        name = "vmrun/g-pat[0x0007040600070402]"
        assert cli.main(["bisect", name, "--qemu", qemu.find(None), "--shows", "qemu-tcg-gpat-unchecked"]) == 1
        assert cli.main(["bisect", name, "--qemu", qemu.find(None), "--shows", "outcome"]) == 1
        assert cli.main(["bisect", name, "--qemu", qemu.find(None), "--shows", "no such text"]) == 0
        assert "C3 outcome" in capsys.readouterr().out
        assert cli.main(["bisect", name, "--qemu", qemu.find(None), "--shows", "outcome", "-q"]) == 1
        assert len(capsys.readouterr().out.splitlines()) == 1

    def test_it_cannot_be_tested(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["bisect", "walk/sizes", "--qemu", "/no/qemu"]) == 125
        assert "cannot be tested no QEMU at '/no/qemu'" in capsys.readouterr().out


GOOD, BAD, BROKEN = "2", "1", ""
"""Builds of QEMU, by the number of processors that each gives L1, whatever is asked; the last does not build. With
one, a locked read-modify-write is a read, then a write: the fault of one lacks W (qemu-tcg-rmw-reads-first)."""


@pytest.mark.guest
@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")
def test_git_bisect_run(tmp_path: Path) -> None:
    """A source tree of eight commits; the sixth breaks it."""
    tree = tmp_path / "tree"
    tree.mkdir()
    env = {**os.environ, "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
           "GIT_COMMITTER_EMAIL": "a@b", "GIT_CONFIG_GLOBAL": os.devnull}

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=tree, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    git("init", "-q")
    for number, build in enumerate([GOOD, GOOD, BROKEN, GOOD, GOOD, BAD, BAD, BAD]):
        script = "exit 1" if build == BROKEN else (
            f'last=\nfor word; do shift; [ "$last" != -smp ] || word={build}; set -- "$@" "$word"; last=$word; done\n'
            f'exec {qemu.find(None)} "$@"')
        (tree / "qemu").write_text(f"#!/bin/sh\n# build {number}\n{script}\n")
        (tree / "qemu").chmod(0o755)
        git("add", "qemu")
        git("commit", "-q", "-m", f"build {number}")
    scenario = tmp_path / "finding.toml"
    scenario.write_text(text('entry = "nested.a.pte"\nclear = ["p"]', run("rmw a = 1")))
    git("bisect", "start", "HEAD", "HEAD~7")
    command = f"{sys.executable} -m harness.cli bisect {scenario} --qemu {tree}/qemu --shows exitinfo1"
    told = git("bisect", "run", "sh", "-c", f"cd {ROOT} && {command}")
    assert git("log", "-1", "--format=%s", "refs/bisect/bad").strip() == "build 5", told
    assert "qemu" in told and "does not show" in told and "C1 exitinfo1, rule nested.present" in told


def test_what_a_fetched_kernel_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree's image and its modules are given as such: the version is not looked for again."""
    tree = tmp_path / "kernel-9.9"
    (tree / "boot").mkdir(parents=True)
    (tree / "version").write_text("9.9.1")
    (tree / "boot" / "vmlinuz-9.9.1").touch()
    options = cli.parser().parse_args(["bisect", "x", "--kernel", "9.9..9.10", "--cpu", "max,-cx16"])
    target = bisect._target(options, "kernel", str(tree))
    assert (target.l0.kernel, target.l0.modules) == (tree / "boot" / "vmlinuz-9.9.1", tree)
    assert (target.machine, target.cpu) == ("kvm-on-tcg", "max,-cx16")
    assert bisect._target(options, "qemu", "/a/qemu").qemu == "/a/qemu"
