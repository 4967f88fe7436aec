"""Scenario files: what is read, and for each mistake the file, the line and the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.scenario.files import find, parse, read
from harness.scenario.ops import Change, EntryOp, HostOp, Probe, RunOp, VmcbOp
from tests.scenario.texts import HEAD, run, text


def test_all_there_is() -> None:
    source = text(
        'entry = "nested.a.pte"\nset = ["nx"]\nclear = ["rw", "us"]',
        'entry = "guest.a.pde"\nvalue = 0x1000\nframe = "b"',
        'vmcb = "asid"\nvalue = 7',
        'host = "efer"\nclear = ["nxe"]',
        'run = ["read a", "write4 b+8 = 1"]\ncpl = 3\nexpect = ["ok", "#PF 0x7"]',
        head='guest_page = "2M"\nnested_page = "1G"\n',
    )
    (scenario,) = parse(source, "dir/x.toml", "x")
    assert (scenario.name, scenario.title, scenario.manual, scenario.shows) == ("x", "t", "15.25", "s")
    assert (scenario.guest_page, scenario.nested_page, scenario.source) == ("2M", "1G", "dir/x.toml")
    assert scenario.ops == (
        EntryOp("nested.a.pte", Change(None, ("nx",), ("rw", "us"))),
        EntryOp("guest.a.pde", Change(0x1000), "b"),
        VmcbOp("asid", Change(7)),
        HostOp("efer", Change(None, (), ("nxe",))),
        RunOp((Probe("read", "a"), Probe("write", "b", 8, 4, 1)), 3, ("ok", "#PF 0x7")),
    )
    lines = source.splitlines()
    assert [lines[n - 1] for n in scenario.lines] == ["[[op]]"] * 5


class TestEach:
    def test_every_combination(self) -> None:
        source = text('entry = "{dim}.a.{level}"\nclear = ["rw"]', run("write a"),
                      head='each = { dim = ["guest", "nested"], level = ["pde", "pte"] }\n')
        source = source.replace('"t"', '"{level}"', 1)
        found = parse(source, "f.toml", "f")
        assert [s.name for s in found] == ["f[guest,pde]", "f[guest,pte]", "f[nested,pde]", "f[nested,pte]"]
        assert [s.ops[0].entry for s in found if isinstance(s.ops[0], EntryOp)] == [
            "guest.a.pde", "guest.a.pte", "nested.a.pde", "nested.a.pte"]
        assert [s.title for s in found] == ["pde", "pte"] * 2

    def test_numbers(self) -> None:
        found = parse(text(run("read a+{n}"), head="each = { n = [8, 16] }\n"), "f.toml", "f")
        assert [s.ops[0] for s in found] == [RunOp((Probe("read", "a", n),)) for n in (8, 16)]

    def test_pages(self) -> None:
        found = parse(text(run("read a"), head='each = { p = ["4K", "1G"] }\nguest_page = "{p}"\n'), "f.toml", "f")
        assert [s.guest_page for s in found] == ["4K", "1G"]


GOOD = run("read a")


@pytest.mark.parametrize(
    ("source", "line", "reason"),
    [
        ("title = ", 1, "not TOML"),
        (HEAD + "[[op]\n" + GOOD, 4, "not TOML"),
        (HEAD + "a = 1\na = 2\n", 5, "not TOML"),
        ("", 1, "'title' is missing"),
        (text(GOOD).replace('title = "t"\n', ""), 1, "'title' is missing"),
        (text(GOOD).replace('manual = "15.25"\n', ""), 1, "'manual' is missing"),
        (text(GOOD).replace('shows = "s"\n', ""), 1, "'shows' is missing"),
        (HEAD, 1, "'op' is missing"),
        (HEAD + "op = []\n", 4, "at least one op"),
        (HEAD + "op = 3\n", 4, "'op' must be a list"),
        (HEAD + "op = [3]\n", 4, r"write \[\[op\]\]"),
        (HEAD + 'colour = "red"\n' + text(GOOD)[len(HEAD):], 4, "unknown key 'colour'"),
        (text(GOOD).replace('title = "t"', "title = 3"), 1, "'title' must be a string, not 3"),
        (text(GOOD).replace('manual = "15.25"', "manual = 15.25"), 2, "'manual' must be a string, not 15.25"),
        (text(GOOD, head='guest_page = "3M"\n'), 4, "guest_page must be one of 4K, 2M, 1G"),
        (text(GOOD, head='nested_page = "4k"\n'), 4, "nested_page must be one of"),
        (text(GOOD, head="each = 3\n"), 4, "'each' must be a table"),
        (text(GOOD, head="each = { a = 3 }\n"), 4, "'each.a' must be a list"),
        (text(GOOD, head="each = { a = [] }\n"), 4, "'each.a' must be a list"),
        (text(GOOD, head="each = { a = [[1]] }\n"), 4, "'each.a' must be a list"),
        (text(GOOD, 'jump = "a"'), 9, "an op has exactly one of entry, vmcb, host, use, invlpga, run"),
        (text(GOOD, 'entry = "guest.a.pte"\nvmcb = "asid"\nvalue = 1'), 9, "this has entry and vmcb"),
        (text(GOOD, "value = 3"), 9, "this has value"),
        (text(GOOD, ""), 9, "this has nothing"),
        (text(GOOD, 'entry = "guest.a.pte"\ncolour = 3'), 11, "unknown key 'colour'"),
        (text(GOOD, 'host = "cr4"\nframe = "a"'), 11, "unknown key 'frame'"),
        (text(GOOD, 'entry = "guest.a.pte"'), 10, "nothing is changed"),
        (text(GOOD, 'entry = 3\nset = ["p"]'), 10, "'entry' must be a string"),
        (text(GOOD, 'entry = "guest.a.pte"\nset = "p"'), 11, "'set' must be a list"),
        (text(GOOD, 'entry = "guest.a.pte"\nset = [3]'), 11, "'set' must be a list of strings"),
        (text(GOOD, 'entry = "guest.a.pte"\nvalue = "x3"'), 11, "'value' must be a number"),
        (text(GOOD, 'entry = "guest.a.pte"\nvalue = true'), 11, "'value' must be a number"),
        (text(GOOD, 'entry = "guest.a.pte"\nvalue = 0x1_0000_0000_0000_0000'), 11, "does not fit in 64 bits"),
        (text(GOOD, 'entry = "guest.a.pte"\nvalue = -1'), 11, "does not fit in 64 bits"),
        (text(GOOD, 'run = "read a"'), 10, "'run' must be a list"),
        (text(GOOD, "run = [1]"), 10, "'run' must be a list of strings"),
        (text(GOOD, 'run = ["red a"]'), 10, "'red a' is not a probe"),
        (text(GOOD, run("read a", cpl=4)), 11, "cpl must be 0, 1, 2 or 3, not 4"),
        (text(GOOD, 'run = ["read a"]\ncpl = "x"'), 11, "'cpl' must be a number"),
        (text(GOOD, 'run = ["read a"]\nexpect = ["ok", "ok"]'), 11, "2 expectations for 1 probes"),
        (text(GOOD, 'run = ["read a"]\nexpect = "ok"'), 11, "'expect' must be a list"),
    ],
)
def test_mistakes(source: str, line: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        parse(source, "some/file.toml", "file")
    assert str(caught.value).startswith(f"some/file.toml:{line}: ")
    assert caught.value.exit_code == 2


def test_the_line_is_the_one_of_the_second_op(tmp_path: Path) -> None:
    """Comments and blank lines count."""
    path = tmp_path / "x.toml"
    path.write_text("# a comment\n\n" + text(GOOD, '# and here\n\n  run = ["nonsense"]  # !'))
    with pytest.raises(UsageError, match=rf"^{path}:14: 'nonsense'"):
        read(path)


class TestReading:
    def test_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "x.toml"
        path.write_bytes(b'title = "\xff\xfe"\n')
        with pytest.raises(UsageError, match=rf"{path}.*cannot be read"):
            read(path)

    def test_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="cannot be read"):
            read(tmp_path / "x.toml")
        with pytest.raises(UsageError, match="no such file or folder"):
            find([tmp_path / "x.toml"])

    def test_a_folder(self, tmp_path: Path) -> None:
        for name in ("b/2.toml", "a.toml", "errata/e.toml", "b/errata/e.toml", "c.txt", "b/1.toml"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("")
        assert [str(p.relative_to(tmp_path)) for p in find([tmp_path])] == ["a.toml", "b/1.toml", "b/2.toml"]
        assert find([tmp_path / "c.txt", tmp_path / "a.toml"]) == [tmp_path / "c.txt", tmp_path / "a.toml"]

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no scenario files"):
            find([tmp_path])

    def test_the_name_is_the_files(self, tmp_path: Path) -> None:
        path = tmp_path / "my-case.toml"
        path.write_text(text(GOOD))
        assert [s.name for s in read(path)] == ["my-case"]
