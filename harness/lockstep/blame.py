"""Whose divergences are: known quirks of the machine, or a rule of the TLB that it breaks. The VMRUN is predicted once
more for each suspect, and only if all then agrees it is that one's doing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from harness.errors import UsageError
from harness.lockstep.active import Active
from harness.lockstep.compare import Context, Divergence, came_to
from harness.lockstep.errata import Known, explain
from harness.lockstep.prediction import Prediction
from harness.lockstep.quirks import FLEETING
from harness.lockstep.twin import Twin
from harness.wire.program import Step
from harness.wire.records import Record

Check = Callable[[Context, Prediction, Record], list[Divergence]]


class Blame:
    """`quirks` are those of the machine, each with its erratum's id, `errata` those with predicates; `check` compares a
    record with a prediction."""

    def __init__(self, twin: Twin, errata: Known, quirks: Mapping[str, str], check: Check) -> None:
        self._twin, self._errata, self._quirks, self._check = twin, errata, quirks, check
        self._actives: dict[tuple[str, ...], Active] = {}

    def quirks(
        self, context: Context, prediction: Prediction, record: Record, vmcb: bytes, step: Step
    ) -> tuple[Prediction, str, str]:
        """The prediction as this machine's quirks make it, and the ids of those errata without which it
        would fail; none if it fails with all of them, and then the prediction is as it was. Last is why L2 cannot be
        followed, where its quirks lead a machine to that which did as they make it do until then."""
        quirks = self._quirks
        if not quirks:
            return prediction, "", ""
        active, astray = Active(), ""

        def agrees(names: Iterable[str]) -> bool:
            nonlocal prediction, active, astray
            active = self._active(tuple(names))
            active.played = set()
            try:
                prediction = self._twin.predict_again(prediction, vmcb, step, active, record, search=False)
                found = self._check(context, prediction, record)
                if found and prediction.unsearched:
                    prediction = self._twin.predict_again(prediction, vmcb, step, active, record)
                    found = self._check(context, prediction, record)
            except UsageError as reason:  # a course that cannot be followed is not the one that the machine took
                if not astray and active.played and came_to(self._twin.last, context, record):
                    astray = str(reason)
                return False
            return all(one.erratum for one in explain(found, self._errata))

        # In a fixed order, so that the verdict is the same whatever was before. One that did not come into
        # play is not needed, which nearly always leaves one.
        needed: list[str] = []
        current = agrees(name for name in quirks if name not in FLEETING)
        if not (current or astray) and not FLEETING.isdisjoint(quirks):
            current = agrees(quirks)
        if astray:
            return prediction, "+".join(quirks[name] for name in quirks if name in active.played), astray
        if current:
            needed = [name for name in quirks if name in active.played]
            for name in reversed(needed):
                if len(needed) > 1:
                    current = agrees(other for other in needed if other != name)
                    if current:
                        needed.remove(name)
        if not needed:
            needed = next(([name] for name in quirks if agrees([name])), [])
            current = bool(needed)
        if not current:
            agrees(needed)
        return prediction, "+".join(quirks[name] for name in needed), ""

    def _active(self, names: tuple[str, ...]) -> Active:
        """One for each combination: translations are remembered by it."""
        if names not in self._actives:
            self._actives[names] = Active(names)
        return self._actives[names]

    def tlb(
        self, context: Context, prediction: Prediction, found: list[Divergence], record: Record, vmcb: bytes, step: Step
    ) -> tuple[Prediction, list[Divergence]]:
        """`found`, and whose fault it is if a machine would do just that which breaks one rule of the TLB."""
        for rule in self._twin.tlb.rules():
            prediction = self._twin.predict_again(prediction, vmcb, step, seen=record, ignores=frozenset([rule]))
            if all(one.erratum for one in explain(self._check(context, prediction, record), self._errata)):
                return prediction, [one if one.erratum else one._replace(rule=rule) for one in found]
        if self._twin.tlb.rules():
            prediction = self._twin.predict_again(prediction, vmcb, step, seen=record)
        return prediction, found
