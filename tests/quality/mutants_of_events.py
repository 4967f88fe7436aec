"""Rules of the model changed one at a time, for tests/quality/test_model_mutants.py.

Deliveries that fault, and the segments that they lead to.
"""

from __future__ import annotations

from typing import Final

from tests.quality.mutants import Mutant

MUTANTS: Final[dict[str, Mutant]] = {
    # deliveries that fault
    "no double faults": Mutant(
        "model.events", "return Event.exception(DF)", "return Event(1)", ("events/double-fault-limit",), "C1", ""),
    "software interrupts are combined": Mutant(
        "model.events", "or first.kind != EXCEPTION", "or False", ("events/software-dpl-delivered",), "C1", ""),
    "no shutdown": Mutant(
        "model.events", "return None\n    if first.vector == PF", "return Event(1)\n    if first.vector == PF",
        ("events/inject-double-fault",), "C1", ""),
    "what is raised on the way is combined before its intercept": Mutant(
        "lockstep.delivery", "if l2.intercepted(second.vector):", "if False:",
        ("events/double-fault-limit",), "C1", ""),
    "no DPL check": Mutant(
        "model.events", "checked and low >> 45 & 3 < regs.cpl", "False", ("events/software-dpl", "events/int-n"), "C1",
        ""),
    "hardware's events meet the DPL check": Mutant(
        "model.events", "checked = event.software and", "checked = True and", ("events/software-dpl",), "C1", ""),
    "IST ignored": Mutant("model.events", "    if ist:", "    if False:", ("events/double-fault-limit",), "C1", ""),
    "the frame of INT n has its own RIP": Mutant(
        "model.events", "regs.rip if next_rip is None else next_rip", "regs.rip", ("intercepts/exceptions",), "C1", ""),
    # deliveries outside of long mode, and the segments that they lead to
    "any gate": Mutant("model.legacy_events", "kind not in _GATES", "False", ("events/legacy-gates",), "C1", ""),
    "all gates of 32 bits": Mutant(
        "model.legacy_events", "4 if kind & 8 else 2", "4", ("events/legacy-gates-16-bit",), "C1", ""),
    "trap gates clear IF": Mutant(
        "model.legacy_events", "0 if kind & 1 else", "0 if False else", ("events/legacy-gates",), "C3", "rflags"),
    "no DPL check in legacy mode": Mutant(
        "model.legacy_events", "checked and gate >> 45 & 3 < regs.cpl", "False", ("events/legacy-software-dpl",), "C1",
        ""),
    "stacks of 32 bits only": Mutant(
        "model.legacy_events", "return _WHOLE if self.segment", "return _WHOLE if True or self.segment",
        ("events/legacy-stack-16-bit",), "C1", ""),
    "any stack segment": Mutant(
        "model.legacy_events", "if not writable or descriptor >> 45 & 3 != cpl:", "if False:",
        ("events/legacy-stack-selector",), "C1", ""),
    "the TSS has no end": Mutant(
        "model.legacy_events", 'if at + 7 > vmcb["tr.limit"]:', "if False:", ("events/legacy-tss-limit",), "C1", ""),
    "RSP0 has no end": Mutant(
        "model.events", 'if at + 7 > vmcb["tr.limit"]:', "if False:", ("events/tss-limit",), "C1", ""),
    "stacks that are not canonical": Mutant(
        "model.events", "Event.exception(SS, 0, EXT)", "Event.exception(GP, 0, EXT)", ("events/tss-canonical",), "C1",
        ""),
    "seven stacks are three": Mutant(
        "model.events", "ist = low >> 32 & 7", "ist = low >> 32 & 3", ("events/ist",), "C1", ""),
    "L1's task priority is none of L2's business": Mutant(
        "lockstep.registers", 'l2.host.get("cr8", l2.state.host.cr8)', 'l2.host.get("cr8", 0)', ("state/l1-cr8",), "C3",
        "rdcr8"),
    "V_GIF lets all in": Mutant(
        "model.vmrun", "if control & VIntr.GIF_ENABLE and not control & VIntr.GIF:", "if False:",
        ("state/virtual-gif",), "C1", "outcome"),
    "STGI leaves V_GIF": Mutant(
        "lockstep.instructions", 'VIntr.GIF if kind == "stgi" else 0', "0", ("state/virtual-gif",), "C3", "v_intr"),
    "an NMI wants IF": Mutant(
        "lockstep.delivery", 'if "nmi" in outside:', 'if "nmi" in outside and l2.regs.rflags & RFLAGS.IF:',
        ("events/physical-nmi-delivered",), "C1", "outcome"),
    "an NMI has another vector": Mutant(
        "lockstep.delivery", "_NMI_VECTOR = 2", "_NMI_VECTOR = 3", ("events/physical-nmi-delivered",), "C3", "rip"),
    "error codes in real mode": Mutant(
        "model.legacy_events", "(rip, 0)], cpl=0)",
        "(rip, 0), *([] if event.error is None else [(event.error, 0)])], cpl=0)",
        ("events/real-injected",), "C1", ""),
    "real mode keeps AC": Mutant(
        "model.legacy_events", "RFLAGS.IF | RFLAGS.AC", "RFLAGS.IF", ("events/real-injected",), "C3", "rflags"),
    "conforming code changes the CPL": Mutant(
        "model.events", "return cpl if descriptor >> 42 & 1 else", "return",
        ("events/code-segment", "events/legacy-code-segment"), "C1", ""),
    "any code segment": Mutant(
        "model.events", "if not is_code or descriptor >> 45 & 3 > cpl:", "if False:",
        ("events/code-segment", "events/legacy-code-segment"), "C1", ""),
    "code that is not there": Mutant(
        "model.events", "if not descriptor >> 47 & 1:", "if False:",
        ("events/code-segment", "events/legacy-code-segment"), "C1", ""),
}
