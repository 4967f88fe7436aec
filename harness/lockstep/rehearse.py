"""A program run on the model alone, before any machine sees it.

It finds what would make a program meaningless (L2 cut off from its own pages, a fetch of what is no
code), and holds a scenario's own expectations, which are for the reader, against the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from harness.errors import UsageError
from harness.lockstep.active import Active
from harness.lockstep.prediction import Prediction
from harness.lockstep.twin import Twin
from harness.model.access import Reached
from harness.model.vmcb import ExitCode
from harness.scenario.ops import RunOp
from harness.scenario.program import Program, where

_NONE: Final = Active()


def rehearse(
    twin: Twin, program: Program, see: Callable[[Prediction], None] = lambda prediction: None,
    expectations: bool = True, enter: Callable[[Twin], None] = lambda twin: None, quirks: Active = _NONE,
) -> int:
    """Run `program` on `twin` alone; returns the number of VMRUNs. `enter` is shown the state before each of them, and
    `see` each prediction, which is of a machine with `quirks`.

    Raises UsageError, with file and line, for an op that makes no sense or, with `expectations`, for one that
    the model does not share."""
    twin.reset(program.world)
    vmruns = 0
    refused: set[int] = set()
    for step in program.steps:
        if step.code != "RUN":
            twin.apply(step)
            continue
        at = where(program.scenario, step.origin)
        if step.a in refused:
            raise UsageError(f"{at}: a VMRUN follows one that is refused, but what that leaves in the VMCB is not "
                             "defined: make it a scenario of its own")
        outcomes: dict[int, str] = {}
        first, begun = 0, twin.begin(step)
        while True:
            enter(twin)
            try:
                twin.quirks = quirks
                prediction = twin.predict(step, first)
            except UsageError as reason:
                raise UsageError(f"{at}: {reason}") from None
            finally:
                twin.quirks = _NONE
            vmruns += 1
            see(prediction)
            for index in range(first, min(prediction.next_probe + 1, len(step.probes))):
                outcomes[index] = _outcome(prediction, index)
            if prediction.refused:
                refused.add(step.a)
                break
            if prediction.exitcode == ExitCode.VMMCALL or prediction.next_probe + 1 >= len(step.probes):
                break
            first = prediction.next_probe + 1
            twin.resume(begun)
        op = program.scenario.ops[step.origin]
        assert isinstance(op, RunOp)
        for index, expected in enumerate(op.expect if expectations else ()):
            if outcomes.get(index, "not reached") != expected:
                raise UsageError(f"{at}: the scenario expects {expected!r} of `{op.probes[index]}`, "
                                 f"the model says {outcomes.get(index, 'not reached')!r}")
    return vmruns


def _outcome(prediction: Prediction, index: int) -> str:
    """The outcome of a probe as `expect` writes it: ok, #PF CODE, #NPF CODE, #GP CODE or INVALID."""
    if prediction.refused:
        return "INVALID"
    if index < prediction.next_probe:
        return "ok"
    walk = prediction.walks.get(index)
    if walk is None or isinstance(walk.outcome, Reached):
        return ExitCode.describe(prediction.exitcode)
    return " ".join(str(walk.outcome).split()[:2])
