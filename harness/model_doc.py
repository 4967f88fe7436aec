"""docs/model.md: every rule of the model, and the scenarios that show it.

    python -m harness.model_doc          # writes it anew

The text at the top stands here; the rules come from harness.model.rules, the scenarios from running the library
on the model alone.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from harness.lockstep.coverage import Coverage
from harness.lockstep.prediction import Prediction
from harness.lockstep.rehearse import rehearse
from harness.lockstep.twin import Twin
from harness.machine import guests, tcg
from harness.model.registers import Cpu
from harness.model.rules import RULES, Rule
from harness.model.universe import NO_CELLS
from harness.scenario import files
from harness.scenario.ops import DEFAULT_MODE, RunOp
from harness.scenario.program import Compiler

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "docs" / "model.md"
COMMAND: Final = "python -m harness.model_doc"
SHOWN: Final = 2
"""Scenarios that are named for a rule."""

_JOINT: Final = "\0"
"""In place of blanks at which no line may be broken."""

CPU: Final = Cpu(40, True, 16, frozenset({
    "nx", "page1g", "smep", "smap", "pku", "la57", "umip", "fsgsbase", "xsave", "lmsle",
}))
"""The processor that scenarios are run on here: what QEMU's `-cpu max` is to L1."""

_TOP: Final = f"""\
<!-- Made by `{COMMAND}`: change that, or harness/model/rules.py. -->

# The model

`harness/model` is the manual's account of address translation under SVM, in Python: of AMD64 Architecture Programmer's
Manual, volume 2 (publication 24593, revisions 3.42 to 3.45). It covers

- the guest dimension: no paging, 32-bit, PAE, 4-level and 5-level tables, every page size, NX, CR0.WP, SMEP, SMAP,
  protection keys, shadow stacks, canonical addresses;
- the nested dimension: the same four formats, by L1's mode at VMRUN; guest mode execute trap, supervisor shadow stack
  check;
- accessed and dirty bits of both, memory types, #PF and #NPF in every bit;
- which VMCBs VMRUN refuses, what it loads, what #VMEXIT saves and restores; exceptions and injected events on their
  way through L2's own IDT.

It does not cover read-only guest page tables (15.25.5, CPUID 8000_000Ah EDX[21]; no processor that L1 runs on here
has them): accesses to guest tables are then writes only where an accessed or dirty bit is to be set, but the manual
does not say whether the nested walk's fault for that comes before or after what else the guest's walk comes to. Nor
does it cover SEV, nor the TLB: what a processor may still hold of an old translation is not asked about, as scenarios
flush first.

## The walk

Each entry of L2's tables has a gPA. To read it, that gPA is translated by L1's nested table first, and at the end the
gPA of the page itself is: a walk of 4-level tables in both dimensions reads 24 entries.

```
                        guest dimension: L2's tables, from gCR3
  gVA ──┬───────────────┬───────────────┬───────────────┬───────────────┐
        │               │               │               │               │ offset
  gCR3 ─┤ gPA of        ┌ gPA of        ┌ gPA of        ┌ gPA of        ┌ gPA of the page
        ▼ pml4e         │ pdpte         │ pde           │ pte           │
  nCR3  nested walk     │ nested walk   │ nested walk   │ nested walk   │ nested walk       nested
   │    pml4e           │ pml4e         │ pml4e         │ pml4e         │ pml4e             dimension:
   │    pdpte           │ pdpte         │ pdpte         │ pdpte         │ pdpte             L1's table,
   │    pde             │ pde           │ pde           │ pde           │ pde               from nCR3
   ▼    pte             │ pte           │ pte           │ pte           │ pte
        │ sPA           │ │ sPA         │ │ sPA         │ │ sPA         │ │
        ▼               │ ▼             │ ▼             │ ▼             │ ▼
        guest pml4e ────┘ guest pdpte ──┘ guest pde ────┘ guest pte ────┘ sPA of the page
        └─────────── user writes in the nested dimension ──────────────┘  the access itself
```

`harness/model/walk.py` is that figure: `walk_nested` a column, `translate` all of it.

## The order of faults

1. An address that is not canonical, before any table is read.
2. From the root down, for each guest entry: its nested walk; then P, then reserved bits.
3. When all guest entries have been read, the rights that they leave together: U/S, R/W, SMEP and SMAP, NX, keys. They
   are one #PF; which of them it is does not show in its error code, but for keys and shadow stacks.
4. The nested walk of the page.

A nested walk has the same order in itself: P and reserved bits of each entry from the root down, then the rights of
all.

## What the manual leaves open

- Accessed and dirty bits of a walk that faults. What a completed nested walk set stays set; of the rest the model has a
  set, not a tolerance: `Liberties` names each kind of room (`nested_cut`, `guest_cut`, `page_not_reached`,
  `other_page`), and a machine's profile says whether it takes it always, sometimes or never. A bit that is set where it
  may not be, or missing where it must be, is a divergence. A processor may also set accessed bits of entries that no
  access needs (`speculates`).
- Translations that were changed since: what a TLB may still hold is a set too (`caches` in the profile;
  [litmus.md](litmus.md)).
- Fields of the VMCB that an exit does not define (`Prediction.free`), bit by bit: EXITINFO1 and 2 where no value is
  named for the exit, I/D of an #NPF where the manual says two things, U of one for a supervisor's data under guest
  mode execute trap (of which 15.25.6 says that features may override it, and 15.25.13 not whether this one does),
  EXITINTINFO and EVENTINJ beside a V bit of 0, RF in the RFLAGS that a fault saves, RIP behind a double fault,
  attributes of a null segment, the save area behind a VMRUN that is refused and behind a shutdown. They are not
  compared; every other bit is.
- What an injected software interrupt returns to: nRIP of the VMCB on a processor that has the field, RIP on others, of
  which 15.20 says no more than that they cannot do it properly.
- Memory types and memory that is not RAM: types are computed and shown beside a walk, and compared with nothing.

## The rules

Under each rule: where it stands, where it cannot decide, and the shortest scenarios of the library in which it does. A
run's cells say in which dimension, at which level, in which modes and with which outcome each rule was put to the test:
`twinwalk coverage`.
"""

_SECTIONS: Final[dict[str, tuple[str, ...]]] = {
    "Both dimensions": ("reached",),
    "The guest dimension": ("canonical", "guest."),
    "The nested dimension": ("nested.",),
    "What a walk and a write leave in memory": ("ad", "write"),
    "VMRUN": ("vmrun.",),
    "#VMEXIT, and events": ("exit.",),
    "Memory types": ("type.",),
    "What a flush takes away": ("tlb.",),
    "MMU contexts": ("context.",),
    "The tables that KVM builds": ("shadow.",),
    "The harness itself": ("lockstep",),
}


def scenarios_by_rule() -> dict[str, list[str]]:
    """The scenarios of the library in which each rule decides, the shortest first, one of each file."""
    image = guests.load_image(guests.build_l1())
    compiler, twin = Compiler(image, CPU), Twin(image, CPU, tcg.LIBERTIES)
    found: dict[str, list[tuple[int, bool, str]]] = defaultdict(list)
    for scenario in files.load([ROOT / "scenarios"]):
        predictions: list[Prediction] = []
        rehearse(twin, compiler.compile(scenario), predictions.append)
        rules = {rule for prediction in predictions for rule in _decided(prediction, twin.host.dr7)}
        length = sum(1 + (len(op.probes) if isinstance(op, RunOp) else 0) for op in scenario.ops)
        unusual = (scenario.guest, scenario.nested) != (DEFAULT_MODE, DEFAULT_MODE)
        for rule in rules:
            found[rule].append((length, unusual, scenario.name))
    return {
        rule: list({name.partition("[")[0]: name for *_, name in sorted(those, reverse=True)}.values())[::-1]
        for rule, those in found.items()
    }


def _decided(prediction: Prediction, host_dr7: int) -> set[str]:
    """The rules that decided a VMRUN or a probe of it, and those that it left to be compared."""
    coverage = Coverage()
    coverage.add(prediction, host_dr7)
    always = {cell.rule for cell in coverage.cells if cell.rule in ("ad", "write") or cell.rule.startswith("exit.")}
    return always | {prediction.rule} | {walk.rule for walk in prediction.walks.values()}


def page(scenarios: Mapping[str, Iterable[str]]) -> str:
    """The whole page."""
    lines = [_TOP]
    for title in _SECTIONS:
        lines += [f"### {title}", ""]
        for rule in RULES.values():
            if section(rule) == title:
                lines += _rule(rule, list(scenarios.get(rule.id, ())))
    return "\n".join(lines).rstrip() + "\n"


def section(rule: Rule) -> str:
    """The section of the page that a rule stands in. Raises KeyError for one that has none."""
    for title, prefixes in _SECTIONS.items():
        if any(rule.id == prefix or rule.id.startswith(prefix.rstrip(".") + ".") for prefix in prefixes):
            return title
    raise KeyError(f"docs/model.md has no section for {rule.id}: add it to _SECTIONS in harness/model_doc.py")


def _rule(rule: Rule, shown: list[str]) -> Iterator[str]:
    where = f" ({rule.section})" if rule.section else ""
    yield from textwrap.wrap(f"**`{rule.id}`**{where}: {rule.text}", 120, break_long_words=False,
                             break_on_hyphens=False)
    yield ""
    items = [f"needs {', '.join(rule.needs)}"] if rule.needs else []
    items += [f"{f'not at {words}' if words else 'in no cell of coverage'}: {why}" for words, why in rule.never]
    if shown:
        items.append("shown by " + ", ".join(f"`{name.replace(' ', _JOINT)}`" for name in shown[:SHOWN]))
    elif rule.id not in NO_CELLS and rule.section:
        items.append("shown by no scenario on a processor that lacks this")
    for item in items:
        wrapped = textwrap.wrap(item, 120, initial_indent="- ", subsequent_indent="  ", break_long_words=False,
                                break_on_hyphens=False)
        yield from (line.replace(_JOINT, " ") for line in wrapped)
    if items:
        yield ""


if __name__ == "__main__":
    PAGE.write_text(page(scenarios_by_rule()), encoding="utf-8")
    print(f"written: {PAGE}")
