"""`twinwalk fetch`: other versions of QEMU and of the kernel, from the distribution's other releases."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from harness.errors import UsageError
from harness.machine import versions
from harness.target import say


def add(commands: Any) -> None:
    """The command, to argparse's sub-commands."""
    parser = commands.add_parser("fetch", help="fetch other versions of QEMU or of the kernel, for --qemu and --kernel")
    parser.add_argument("kind", nargs="?", choices=versions.KINDS, help="what to fetch")
    parser.add_argument("versions", nargs="*", metavar="VERSION",
                        help="such as 10.0 (the newest that begins so) or 6.12.95")
    parser.add_argument("--list", action="store_true", dest="listing", help="say what there is, and what is here")
    parser.set_defaults(command=_fetch)


def _fetch(options: argparse.Namespace) -> int:
    if options.listing:
        if options.versions:
            raise UsageError("fetch --list takes no versions")
        for line in listing([options.kind] if options.kind else versions.KINDS):
            print(line)
        return 0
    if not options.versions:
        raise UsageError("say what to fetch: `twinwalk fetch qemu 10.0`, `twinwalk fetch kernel 6.12`, or --list")
    for name in options.versions:
        one = versions.fetch(options.kind, name, say)
        print(f"{one.kind} {versions.dotted(one.version)} is in {one.path}")
    return 0


def listing(kinds: Iterable[str]) -> Iterator[str]:
    """A line for each version that a mirror has or that is in the cache, then why others cannot be had."""
    troubles: list[str] = []
    for kind in kinds:
        here = {(one.path if kind == "kernel" else one.path.parent).name: one for one in versions.fetched(kind)}
        offers, missing = versions.available(kind, say)
        troubles += [trouble for trouble in missing if trouble not in troubles]
        for offer in offers:
            own = here.pop(offer.name, None)
            number = versions.dotted(own.version if own else offer.version)
            yield (f"{kind:6} {number:10} {'fetched' if own else '':8} {offer.offer.suite:19} "
                   f"{offer.offer.name} {offer.offer.version}")
        for one in here.values():
            yield f"{kind:6} {versions.dotted(one.version):10} fetched  {'(in no suite now)':19} {one.path}"
    yield from (f"not to be had: {trouble}" for trouble in troubles)
