"""Kernels in whose memory KVM cannot be found say so, with the reason."""

from __future__ import annotations

import pytest

from harness.cli import parser
from harness.errors import LaunchFailed, UsageError
from harness.machine import kernel, kvm_on_tcg
from harness.machine.l0_kvm import L0Kvm
from harness.machine.trace import Unobservable
from harness.model.memory import Memory
from harness.options import is_pipelined, targeted
from harness.target import Target


class Shell:
    """An L0 that answers as it is told."""

    def __init__(self, answers: dict[str, bytes]) -> None:
        self._answers = answers

    def try_run(self, script: str) -> tuple[int, bytes, bytes]:
        for name, answer in self._answers.items():
            if name in script:
                return 0, answer, b""
        return 1, b"", b"No such file or directory"


@pytest.mark.parametrize(
    ("answers", "reason"),
    [({}, "no type information of vmlinux"),
     ({"btf/vmlinux": b"", "btf/kvm_amd": b""}, "no type information of kvm "),
     ({"btf/": b"\x9f\xeb"}, "cannot be read: no BTF"),
     ({"btf/": bytes.fromhex("9feb010018000000") + bytes(16)}, "there is no struct kvm")],
)
def test_a_kernel_that_does_not_say_where_things_are(answers: dict[str, bytes], reason: str) -> None:
    with pytest.raises(Unobservable, match=reason):
        L0Kvm(Shell(answers), Memory(4096), 40, 4)


def arguments(*argv: str) -> tuple[Target, object]:
    options = parser().parse_args(["run", *argv])
    return targeted(options), options


def test_the_option() -> None:
    for argv, every in ((("--audit",), 1), (("--audit=16",), 16), ((), 0)):
        target, _ = arguments("--machine", "kvm-on-tcg", *argv)
        assert target.l0.audit == every
        assert (f"--audit={every}" in target.arguments()) == bool(every)


def test_it_means_kvm_on_tcg_and_an_l1_that_waits() -> None:
    target, options = arguments("--audit")
    assert target.chosen().machine == "kvm-on-tcg"
    assert not is_pipelined(options, target.chosen())  # type: ignore[arg-type]
    target, options = arguments("--audit", "--pipelined")
    with pytest.raises(UsageError, match="--pipelined"):
        is_pipelined(options, target.chosen())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--machine kvm-on-tcg"):
        arguments("--machine", "tcg", "--audit")


def test_a_path_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("--audit", "scenarios/walk")
    assert "write --audit=1" in capsys.readouterr().err


@pytest.mark.guest
def test_a_kvm_without_nested_paging_is_refused() -> None:
    try:
        kernel.find(None, None)
    except LaunchFailed as reason:
        pytest.skip(f"no kernel for L0: {reason}")
    options = kvm_on_tcg.Options(parameters=("npt=0",), audit=1)
    with pytest.raises(LaunchFailed, match=r"--audit: .* npt=0"), kvm_on_tcg.start(options=options):
        pass
