"""What is wrong, in a sentence that names the entry and the manual's section: the first line of every report."""

from __future__ import annotations

import re
from typing import Final

from harness.lockstep.compare import Divergence
from harness.model.access import ErrorCode, GeneralProtection, NestedPageFault, PageFault, Reached, StackFault
from harness.model.rules import RULES
from harness.model.vmcb import FIELDS
from harness.report import words
from harness.report.beside import Beside
from harness.report.findings import Finding
from harness.scenario.ops import Probe, Scenario

_REFUSED: Final = "VMEXIT_INVALID"
_VALUES: Final = re.compile(r": it is [^\s,;]+( \([^)]*\))?(, and must be [^\s,;]+( \([^)]*\))?)?")
_NUMBER: Final = re.compile(r"0x[0-9a-f]+")
_HALF_REFUSED: Final = "VMEXIT 0xffffffff,"
_RAISED: Final = re.compile(r"(exception \d+) of VMRUN")
_DONE: Final = re.compile(r"done, result (0x[0-9a-f]+)$")
_CONTEXTS: Final = {
    "context.direct-l1": "of L1",
    "context.direct-l2": "of L2, which runs without nested paging,",
    "context.nested": "of L2, which runs on L1's nested table,",
    "context.guest-table": "of a guest on a host without usable nested paging",
    "context.back": "of L1 after #VMEXIT",
}
_VERBS: Final = {"read": "read", "pop": "read", "write": "write", "push": "write", "rmw": "write",
                 "fetch": "fetch from"}
"""What L2 does to memory, by the kind of probe."""
_SAVED: Final = {"exitintinfo": "15.7.2", "v_intr": "15.21.4", "interrupt_shadow": "15.21.5"}
"""Sections about what #VMEXIT saves in these fields; of all others it is 15.6."""
_EXIT: Final = ("exitcode", "exitinfo1", "exitinfo2", "rip")


def headline(finding: Finding, scenario: Scenario | None) -> str:
    """What is wrong, of the finding's first divergence, with the manual's section where the rule has one."""
    said, sections = _sentence(finding, scenario), cited(finding.first)
    return f"{said.removesuffix('.')}; manual {sections}." if sections else said


def kind(finding: Finding) -> str:
    """What is wrong, without the probe, the addresses and the values."""
    said = _VALUES.sub("", _sentence(finding, None).removesuffix("."))
    return f"{_NUMBER.sub('...', said)} (rule {finding.first.rule})"


def cited(one: Divergence) -> str:
    """The manual's sections (volume 2) for what a divergence is about; empty where it is no rule of the manual's."""
    name = rule_of(one)
    if one.field == "outcome" and str(one.observed).startswith((_REFUSED, _HALF_REFUSED)) and one.expected != _REFUSED:
        return RULES["vmrun.legal"].section
    if one.check == "C3" and name.startswith(("guest.", "nested.", "exit.vmmcall")):
        return _SAVED.get(one.field, "15.6")  # not the rule of the fault that L2 left by, but of what it left behind
    if one.field == "exitinfo1" and one.check == "C1":
        return "15.25.6" if name.startswith("nested.") else "8.4.2"
    return RULES[name].section if name in RULES else ""


def rule_of(one: Divergence) -> str:
    """The id of the rule that a divergence is about: the exit's own says nothing of a probe in the middle of a run."""
    of_walk = one.check == "C1" and one.field in ("outcome", "value")
    return one.walk.rule if one.walk is not None and of_walk else one.rule


def _sentence(finding: Finding, scenario: Scenario | None) -> str:
    one = finding.first
    found = words.probe_of(scenario, finding.op, finding.probe)
    probe, who = (found[0], f"`{found[0]}`") if found is not None else (None, "L2")
    address = words.entry_address(one.field)
    if one.check == "C4":
        return _context(one)
    if one.check == "C5":
        return f"KVM's {one.field} is not justified: it has {one.observed} where there must be {one.expected}."
    if one.field == "outcome":
        return _outcome(finding, who, probe)
    if address is not None:
        return _entry(one, who)
    if one.field.startswith("memory at "):
        return _memory(finding, who)
    if one.field == "value":
        return _value(one, who, probe)
    if one.check == "C1" and any(d.field == "rip" for d in finding.divergences):
        return f"L2 faults at another instruction than {who}, and {one.field.upper()} is wrong{_why(one)}."
    if one.check == "C1":
        return f"{who} faults as it must, but {one.field.upper()} is wrong{_why(one)}."
    return _state(one, who, probe)


def _context(one: Divergence) -> str:
    """C4: which context, and what of it."""
    if one.rule == "context.vmrun":
        return f"The hypervisor under L1 did not run what L1's VMCB says: {one.field}."
    return f"The MMU context {_CONTEXTS.get(one.rule, 'under L1')} is wrong: {one.field}."


def _outcome(finding: Finding, who: str, probe: Probe | None) -> str:
    one = finding.first
    want, got = str(one.expected), str(one.observed)
    if raised := _RAISED.match(got):
        return f"VMRUN raised {raised[1]} in L1{_must_be_refused(one) if want == _REFUSED else '; it must run L2'}."
    if want == _REFUSED and got.startswith(_HALF_REFUSED):
        return "VMRUN was refused as it must be, but EXITCODE is 0xffffffff, half of VMEXIT_INVALID."
    if want == _REFUSED:
        return f"The machine ran L2 ({got}){_must_be_refused(one)}."
    if got.startswith((_REFUSED, _HALF_REFUSED)):
        return "VMRUN was refused, and must not be."
    faults, reported = one.walk is not None and not isinstance(one.walk.outcome, Reached), words.parse_outcome(got)
    if faults and got.startswith("done"):
        return _let_through(finding, who, probe)
    if not faults and want.startswith(("sPA", "done")):
        if reported is None:
            return f"{who} ended in {_kind(got)}; it must go through."
        permitted = ", which every entry of its walk permits" if one.walk is not None else "; it must go through"
        return f"The machine raised {got} for {who}{permitted}."
    if not faults and got.startswith("done"):
        return f"The machine let {who} through, which must end in {_kind(want)}."
    if reported is not None and _kind(got) == _kind(want):
        return f"{who} ended in {got}, not in {want}."
    return f"{who} ended in {_kind(got)}, not in {_kind(want)}{_because(finding) if faults else ''}."


def _must_be_refused(one: Divergence) -> str:
    """By which rule, if it is one of those that refuse."""
    text = RULES[one.rule].text if one.rule in RULES else ""
    return f", though {text.removesuffix('.')}" if text.startswith("VMRUN is refused") else "; VMRUN must be refused"


def _let_through(finding: Finding, who: str, probe: Probe | None) -> str:
    """The model's walk ends in a fault, and the machine did the access."""
    where, verb = _where(finding, probe), _verb(finding, probe)
    what = f"L2 {verb} {where}" if where and verb else f"{who if probe is not None else 'an access of L2'} through"
    return f"The machine let {what}{_because(finding)}."


def _because(finding: Finding) -> str:
    """Why the walk must fault: the entry that ends it, and what of it."""
    assert finding.walk is not None
    if isinstance(finding.walk.outcome, GeneralProtection | StackFault):
        return ": the address is not canonical"
    if not finding.walk.trail:
        return ""
    both = Beside(finding)
    index, why = both.end()
    step = both.steps[index]
    return f": the {step_name(step.dimension, step.level, step.purpose)} has {why}"


def _where(finding: Finding, probe: Probe | None) -> str:
    """What the machine came to, as far as it is known: a read returned what names its sPA, or the walk came to a
    page before it was stopped by rights."""
    result = _DONE.match(str(finding.first.observed))
    came = words.told_by(int(result[1], 16), probe) if result is not None and probe is not None else None
    if came is not None:
        return f"sPA {came:#x}"
    return Beside(finding).stopped_at() if finding.walk is not None and finding.walk.trail else ""


def _verb(finding: Finding, probe: Probe | None) -> str:
    if probe is not None:
        return _VERBS.get(probe.kind, "")
    outcome = finding.walk.outcome if finding.walk is not None else None
    if not isinstance(outcome, PageFault | NestedPageFault) or outcome.error_code & ErrorCode.GUEST_TABLE:
        return ""
    code = outcome.error_code
    return "fetch from" if code & ErrorCode.ID else "write" if code & ErrorCode.W else "read"


def _kind(outcome: str) -> str:
    """`#NPF` of an outcome's text, without its numbers; an exit by an exception is that exception."""
    return outcome.split()[0].rstrip(",").replace("VMEXIT_#", "#") if outcome else "nothing"


def _entry(one: Divergence, who: str) -> str:
    why = words.difference(one) or "it has another value"
    name = entry_name(one)
    return f"{who} left the {name} wrong: {why}." if name else f"The {one.field} is wrong: {why}."


def entry_name(one: Divergence) -> str:
    """`nested pte for the guest's pde`, of an entry that the divergence's walk went through; else empty."""
    step = words.step_of(one)
    return step_name(step.dimension, step.level, step.purpose) if step is not None else ""


def step_name(dimension: str, level: str, purpose: str) -> str:
    """A step of a walk in words: `guest pde`, or `nested pte for the guest's pde`."""
    if not purpose:
        return f"{dimension} {level}"
    return f"{dimension} {level} for the {'page itself' if purpose == 'final' else f'guest{chr(39)}s {purpose}'}"


def _memory(finding: Finding, who: str) -> str:
    one, wrong = finding.first, [one.field.upper() for one in finding.divergences if one.field in _EXIT]
    what = one.field.removeprefix("memory at ")
    also = f"; the exit differs too: {', '.join(wrong)}" if wrong else ""
    if one.expected == "unchanged":
        return f"{who} or another access changed memory at {what}, which must stay as it was{also}."
    if one.observed == "unchanged":
        return f"{who} did not reach memory at {what}, which it must change{also}."
    return f"Memory at {what} is wrong: {words.instead(one)}{also}."


def _value(one: Divergence, who: str, probe: Probe | None) -> str:
    came = words.reached_instead(one, probe)
    if came is not None and one.walk is not None and isinstance(one.walk.outcome, Reached):
        return f"{who} came to sPA {came:#x}; it must come to sPA {one.walk.outcome.spa:#x}."
    return f"{who} returned a wrong value: {words.instead(one)}."


def _state(one: Divergence, who: str, probe: Probe | None) -> str:
    name, why = one.field, _why(one)
    if name.endswith(" before VMRUN"):
        return f"Before VMRUN the VMCB's {name.removeprefix('vmcb.').removesuffix(' before VMRUN')} was wrong{why}."
    if name == "l1.early" and isinstance(one.observed, int) and one.observed & 4:
        return f"L1 took exception {one.observed >> 8} behind the #VMEXIT: nothing of its own raised it."
    if name == "l1.early":
        return "L1 took an NMI or an interrupt while GIF was 0."
    if name.startswith("l1."):
        return f"#VMEXIT did not give L1 its {name[3:].upper()} back{why}."
    if name.startswith("l2."):
        return f"{name[3:].upper()} of L2 is not what it must be after #VMEXIT{why}."
    if probe is not None and name == probe.kind:
        return f"{who} returned a wrong value{why}."
    if name in FIELDS or name.startswith("reserved+"):
        behind = f"After {who} the" if probe is not None else "The"
        return f"{behind} VMCB's {name} is wrong{why}."
    return f"{name} is wrong{why}."


def _why(one: Divergence) -> str:
    return f": {words.difference(one) or words.instead(one)}"
