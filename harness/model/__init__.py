"""The reference model: AMD64 address translation under SVM nested paging, as the manual has it.

Pure: no I/O, no clock, no logging, the standard library only. Sections cited are those of the
AMD64 Architecture Programmer's Manual, volume 2 (publication 24593).

    registers, illegal   control-register bits, what a CPU can do; what cannot be written to a register
    entries    page-table entries and the formats of the tables they stand in
    access     what is asked of the MMU, and what may come of it
    walk       the one- and the two-dimensional walk
    dirty, speculation   writing accessed and dirty bits back; those of accesses that are never made
    vmcb       the VMCB's fields
    vmrun      what VMRUN loads, and the state after #VMEXIT
    consistency  which VMCBs VMRUN refuses
    intercepts   what L1 asks to have intercepted
    events, legacy_events   exceptions and interrupts through L2's IDT, in long mode and outside of it
    local_apic   memory that is no RAM
    memory_type  PAT, MTRRs and CR0.CD: computed, compared with nothing
    tlb        in which ways an access may be translated other than by the tables as they are
    tlb_events, tlb_search   what happens that matters to it; the search for what it may hold
    liberties  what the manual leaves to the machine
    mmu_context  KVM's MMU contexts, and what switches them
    ranges     L1's nested table, walked by ranges
    backing    what lies under L1's memory in L0
    shadow     whether the tables that KVM built are justified
    rules      every rule by its id, with the manual's section
    coverage   the cases of rules that a walk is one of
    universe, specimens   all the cases that there are; the small tables that they are computed with
    memory     system-physical memory
    given      a translation by CR3 and nCR3, or by a VMCB, of which there is a dump

What one needs to compute a walk is here by name: docs/library.md.
"""

from harness.model.access import Access, ErrorCode, NestedPageFault, PageFault, Reached
from harness.model.dirty import write_back
from harness.model.given import by_cr3, by_vmcb
from harness.model.memory import Memory, Words
from harness.model.registers import Cpu
from harness.model.rules import RULES
from harness.model.vmcb import Vmcb
from harness.model.walk import Paging, Step, Walk, translate

__all__ = [
    "RULES", "Access", "Cpu", "ErrorCode", "Memory", "NestedPageFault", "PageFault", "Paging", "Reached", "Step",
    "Vmcb", "Walk", "Words", "by_cr3", "by_vmcb", "translate", "write_back",
]
