"""Bundles: written whole or not at all, read as they were written, and refused with where and why if they are not."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import TwinwalkError, UsageError
from harness.lockstep.signature import Signature
from harness.report import bundle as bundles
from harness.report.bundle import MANIFEST, RECORDS, SCENARIO, WALKS, About, Bundle, check_folder, name_of, read, write
from harness.scenario.shrink import bare
from tests.scenario.texts import one, run

ABOUT = About(
    check="C1", field="outcome done", rule="nested.write", kind="stable", seen=10, tried=10, strict=False,
    pipelined=True, found_in="sweeps/joint[4-level,write]", ops=17,
    machine={"machine": "tcg", "qemu_version": "7.2.22"},
    target={"machine": "tcg", "cpu": "max"}, command="./twinwalk run --bundles x", twinwalk="0.1.0",
    divergences=[{"op": 1, "probe": 0, "check": "C1", "field": "outcome", "expected": "#NPF", "observed": "done"}],
)
SMALL = one('entry = "nested.a.pte"\nclear = ["rw"]', run("write a"), name="sweeps/joint[4-level,write]")
BUNDLE = Bundle(ABOUT, SMALL, (one("read b", name="first"), one("read c", name="second")),
                ({"kind": "ENTER", "op": 1}, {"kind": "EXIT", "op": 1, "vmcb": {"exitcode": "0x400"}}),
                "walks \udc80 ü\n")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write(tmp_path, BUNDLE)


def manifest(path: Path, change: Callable[[dict[str, Any]], None], sign: bool = True) -> None:
    """Change what the manifest says; `sign` makes its digest fit again, as somebody who means harm would."""
    file = path / MANIFEST
    content = json.loads(file.read_text())
    change(content)
    if sign:
        content.pop("digest", None)
        content["digest"] = bundles._digest_of(content)
    file.write_text(json.dumps(content))


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_read_as_written(written: Path) -> None:
    found = read(written)
    assert found.about == ABOUT and found.about.signature == Signature("C1", "outcome done", "nested.write")
    assert (bare(found.scenario), [bare(one) for one in found.before]) == (
        bare(SMALL), [bare(one) for one in BUNDLE.before])
    assert [scenario.name for scenario in found.before] == ["first", "second"]
    assert found.records == BUNDLE.records and found.walks == "walks \\udc80 ü\n"


def test_names(tmp_path: Path) -> None:
    assert name_of(ABOUT) == "joint-c1-outcome-done-nested.write"
    assert write(tmp_path, BUNDLE).name == "joint-c1-outcome-done-nested.write.twin"
    assert write(tmp_path, BUNDLE).name == "joint-c1-outcome-done-nested.write-2.twin"
    hostile = replace(ABOUT, found_in="../../etc/..[x]", field="/\0 ../$(rm)", rule="x" * 500)
    assert write(tmp_path, replace(BUNDLE, about=hostile)).parent == tmp_path
    assert "/" not in name_of(hostile) and len(name_of(hostile)) <= 80
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".twin"] * 3  # and nothing else


def test_the_scenario_is_a_file_of_the_library(written: Path) -> None:
    from harness.scenario import files

    (found,) = files.load([written / SCENARIO])
    assert found.ops == SMALL.ops


class TestNotWhole:
    """What cannot be written leaves nothing behind."""

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(TwinwalkError, match=r"no bundle could be written to .*: No such file"):
            write(tmp_path / "none", BUNDLE)

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(number: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(TwinwalkError, match=r"No space left"):
            write(tmp_path, BUNDLE)
        assert not list(tmp_path.iterdir())

    def test_ctrl_c(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(number: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("os.fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, BUNDLE)
        assert not list(tmp_path.iterdir())

    def test_checked_before_a_run(self, tmp_path: Path) -> None:
        check_folder(tmp_path / "a" / "b", "--bundles")
        assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match=r"--bundles .*/file: cannot write there: .*: name another folder"):
            check_folder(tmp_path / "file", "--bundles")


class TestRefused:
    """Every bad bundle: exit code 2, where and why."""

    def test_no_bundle(self, tmp_path: Path) -> None:
        (tmp_path / "file.twin").write_text("{}")
        for path in (tmp_path, tmp_path / "none.twin", tmp_path / "file.twin"):
            assert refused(path) == (f"{path}: this is no bundle: a bundle is a folder NAME.twin with a bundle.json "
                                     "in it")

    @pytest.mark.parametrize("name", [MANIFEST, SCENARIO, RECORDS, WALKS, "before-2.toml"])
    @pytest.mark.parametrize("left", [0, 1, 10])
    def test_truncated(self, written: Path, name: str, left: int) -> None:
        data = (written / name).read_bytes()
        (written / name).write_bytes(data[: len(data) * left // 11])
        text = refused(written)
        assert text.startswith(f"{written / name}:") and ("not whole" in text or "not JSON" in text)

    @pytest.mark.parametrize("name", [SCENARIO, RECORDS, WALKS, "before-1.toml"])
    def test_missing(self, written: Path, name: str) -> None:
        (written / name).unlink()
        assert refused(written) == (f"{written / name}: cannot be read: No such file or directory: the bundle is not "
                                    "whole")

    def test_edited_by_hand(self, written: Path) -> None:
        file = written / SCENARIO
        file.write_text(file.read_text().replace("write a", "write b"))
        text = refused(written)
        assert text.startswith(f"{file}: it was changed since the bundle was written")
        assert "`twinwalk run FILE`" in text

    def test_manifest_edited_by_hand(self, written: Path) -> None:
        manifest(written, lambda content: content.update(kind="flaky"), sign=False)
        assert refused(written).startswith(f"{written / MANIFEST}: it was changed since it was written")

    @pytest.mark.parametrize("number", [0, 2, "1", None])
    def test_another_format(self, written: Path, number: object) -> None:
        manifest(written, lambda content: content.update(format=number, twinwalk="9.9"), sign=False)
        assert refused(written) == (f"{written / MANIFEST}: its format is {number!r}, this version reads format 1: use "
                                    "the twinwalk that wrote it (9.9)")

    @pytest.mark.parametrize("name", list(About.__dataclass_fields__))
    @pytest.mark.parametrize("value", [None, [7], 1.5])
    def test_values_of_another_type(self, written: Path, name: str, value: object) -> None:
        manifest(written, lambda content: content.update({name: value}))
        text = refused(written)
        assert text.startswith(f"{written / MANIFEST}: {name!r} must be ") or "each of its divergences must" in text
        manifest(written, lambda content: content.pop(name))
        assert refused(written).startswith(f"{written / MANIFEST}: {name!r} must be ")

    @pytest.mark.parametrize("text", [
        "", "[", "[]", "7", '{"format": 1', "[" * 100_000, '{"format": ' + "9" * 10_000 + "}", "\0", "nothing",
    ])
    def test_no_manifest(self, written: Path, text: str) -> None:
        (written / MANIFEST).write_text(text)
        assert refused(written).startswith(f"{written / MANIFEST}:")

    def test_not_utf_8(self, written: Path) -> None:
        (written / MANIFEST).write_bytes(b"\xff\xfe{}")
        assert refused(written) == f"{written / MANIFEST}: it is not text in UTF-8"

    @pytest.mark.parametrize("name", ["../scenario.toml", "/etc/passwd", "extra.toml", "before-3.toml", ""])
    def test_other_files(self, written: Path, name: str) -> None:
        manifest(written, lambda content: content["files"].update({name: "0" * 32}))
        assert refused(written).startswith(f"{written / MANIFEST}: its files must be before-1.toml, before-2.toml, ")
        manifest(written, lambda content: content.update(before=["x"] * 4))
        assert refused(written).startswith(f"{written / MANIFEST}: its files must be ")

    def test_a_large_file(self, written: Path) -> None:
        with (written / WALKS).open("r+b") as file:
            file.truncate(17 << 20)
        assert refused(written) == f"{written / WALKS}: it has more than 16,777,216 bytes: no bundle of ours does"

    def resigned(self, path: Path, name: str, data: bytes) -> None:
        (path / name).write_bytes(data)
        manifest(path, lambda content: content["files"].update({name: bundles._digest(data)}))

    @pytest.mark.parametrize(
        ("name", "text", "why"),
        [
            (SCENARIO, "title = 7", "scenario.toml:1: 'title' must be a string"),
            (SCENARIO, "]", "scenario.toml:1: not TOML"),
            (SCENARIO, 'title = "t"\nmanual = "1"\nshows = "s"\neach = { n = [1, 2] }\n[[op]]\nrun = ["read a"]\n',
             "scenario.toml: it must be one scenario, not 2"),
            ("before-1.toml", 'title = "t"\n', "before-1.toml:1: 'manual' is missing"),
            (SCENARIO, "\udcff", "scenario.toml: it is not text in UTF-8"),
            (RECORDS, "{}", "records.json: it must be a list of objects"),
            (RECORDS, "[1]", "records.json: it must be a list of objects"),
            (RECORDS, "[\n{},\n{", "records.json:3: not JSON"),
        ],
    )
    def test_files_that_fit_but_are_wrong(self, written: Path, name: str, text: str, why: str) -> None:
        self.resigned(written, name, text.encode(errors="surrogateescape"))
        assert refused(written).startswith(f"{written}/{why}")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
    def test_not_readable(self, written: Path) -> None:
        (written / WALKS).chmod(stat.S_IWUSR)
        assert "Permission denied" in refused(written)
