"""Quirks that are in force: what they make of a prediction, and which of them made a difference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from harness.lockstep.quirks import NESTED_FORMAT_BY_L2, QUIRKS, Quirk, is_below
from harness.model.access import Access
from harness.model.entries import Format
from harness.model.vmcb import Vmcb
from harness.model.vmrun import Host
from harness.model.walk import Paging, Walk


class Active:
    """Quirks that are in force: `names`. `played` are those of them that made a difference, and perhaps
    more, but none that made a difference is missing."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = tuple(names)
        self.played: set[str] = set()
        self._quirks = [(name, QUIRKS[name]) for name in self.names]
        self._on_access = [(name, one.access) for name, one in self._quirks if one.access is not Quirk.access]
        self._on_walk = [(name, one.walk) for name, one in self._quirks if one.walk is not Quirk.walk]
        self._refusing = [(name, one.refuses) for name, one in self._quirks if one.refuses is not Quirk.refuses]
        self._of_paging: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.names)

    def has(self, name: str) -> bool:
        """Whether L2 does as that quirk says; asked where it makes a difference."""
        if name in self.names:
            self.played.add(name)
            return True
        return False

    def on_paging(self, paging: Paging, kept: Format | None = None) -> tuple[Paging, tuple[str, ...]]:
        """`paging` as this machine has it, and the quirks that changed it, for `use`. `kept` is the format that a
        hypervisor has L1's nested table in (harness.lockstep.kept_format), if it is one that has."""
        changed = []
        if kept is not None and paging.nested is not None and paging.nested != kept:
            changed.append(NESTED_FORMAT_BY_L2)
            paging = paging._replace(nested=kept)
        for name, quirk in self._quirks:
            new = quirk.paging(paging)
            if new != paging:
                changed.append(name)
                paging = new
        return paging, tuple(changed)

    def use(self, changed: tuple[str, ...]) -> None:
        """From now on walks are under a paging that these quirks changed."""
        self._of_paging = changed

    @contextmanager
    def by_software(self, paging: Paging) -> Iterator[Paging]:
        """`paging` while a hypervisor below L1 walks L2's own tables itself, by none of the CPU's habits."""
        hardware, its_walks = self._of_paging, self._on_walk
        self._on_walk = [one for one in its_walks if not is_below(one[0])]
        for name, quirk in self._quirks:
            new = quirk.by_software(paging)
            if new != paging:
                self._of_paging += (name,)
                paging = new
        try:
            yield paging
        finally:
            self._of_paging, self._on_walk = hardware, its_walks

    def on_access(self, access: Access, cpl: int) -> Access:
        """`access` as this machine makes it, at that CPL."""
        for name, change in self._on_access:
            new = change(access, cpl)
            if new != access:
                self.played.add(name)
                access = new
        return access

    def on_refusal(self, broken: Iterable[str], vmcb: Vmcb, host: Host) -> str:
        """The rule by which this machine refuses a VMRUN that breaks the rules `broken`; or an empty string."""
        for name, refuses in self._refusing:
            if rule := refuses(vmcb):
                self.played.add(name)
                return rule
        for rule in broken:
            accepting = [name for name, quirk in self._quirks if quirk.accepts(rule, vmcb, host)]
            if not accepting:
                return rule
            self.played.update(accepting)
        return ""

    def on_walk(self, paging: Paging, walk: Walk) -> Walk:
        """`walk` as this machine ends it."""
        for name in self._of_paging:
            if name not in self.played and QUIRKS[name].seen(walk):
                self.played.add(name)
        for name, change in self._on_walk:
            new = change(paging, walk)
            if new is not walk:
                self.played.add(name)
                walk = new
        return walk
