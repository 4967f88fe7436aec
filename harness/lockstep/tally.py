"""How far a sweep came: counts in place of the results of its cases, which are many."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from harness.lockstep.result import Result


@dataclass
class Tally:
    """How far one sweep came: `done` cases in this run, which was to do `asked`, and `before` in earlier ones,
    of `total`; pairs and triples of values that those of this run and of earlier ones have had."""

    name: str
    total: int
    before: int = 0
    asked: int = 0
    done: int = 0
    pairs: int = 0
    pairs_total: int = 0
    triples: int = 0
    triples_total: int = 0
    vmruns: int = 0
    probes: int = 0
    table_bytes: int = 0
    contexts: int = 0
    trace_events: int = 0
    stale_permitted: int = 0
    stale_seen: int = 0
    shadow_audits: int = 0
    shadow_leaves: int = 0
    divergences_new: int = 0
    skipped: int = 0
    """Cases that cannot be run on this CPU."""
    known: Counter[str] = field(default_factory=Counter)
    """Divergences that errata explain, by the ids of the errata."""
    known_cases: Counter[str] = field(default_factory=Counter)

    def add(self, result: Result, strict: bool) -> bool:
        """Count a result; whether there is more to say of it than that."""
        if result.skipped:
            self.skipped += 1
            return False
        self.done += 1
        self.vmruns += result.vmruns
        self.probes += result.probes
        self.table_bytes += result.table_bytes
        self.contexts += result.contexts
        self.trace_events += result.trace_events
        self.stale_permitted += result.stale_permitted
        self.stale_seen += result.stale_seen
        self.shadow_audits += result.shadow_audits
        self.shadow_leaves += result.shadow_leaves
        new = [one for one in result.divergences if strict or one.erratum is None]
        self.divergences_new += len(new)
        if new or result.lost or result.senseless:
            return True
        ids = [name for one in result.divergences if one.erratum for name in one.erratum.split("+")]
        self.known.update(ids)
        self.known_cases.update(set(ids))
        return False
