"""Every rule by its id, with the section of the manual that it stands in.

A walk, a refused VMRUN and a check each name the rule behind their verdict by id; reports look it up
here. Sections are those of the AMD64 Architecture Programmer's Manual, volume 2 (publication 24593),
as numbered in its revisions 3.42 to 3.45; the sentences are ours.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Rule(NamedTuple):
    """One rule: `section` of volume 2, empty for what is no rule of the manual; `text` in one sentence.

    `never` says where a rule of the walk cannot decide, and why: words of a dimension, a table format or a
    level, or `off` and `none` for a dimension without paging, all of which must fit (`PAE pdpte`), and the
    reason; no words are a rule that no run can put to the test. `needs` are the CPUID features without which
    it never decides.
    """

    id: str
    section: str
    text: str
    never: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """Where to look it up: `AMD APM vol. 2, 15.25.6`; empty for what is no rule of the manual."""
        return f"AMD APM vol. 2, {self.section}" if self.section else ""


_PDPTE: Final = ("PAE pdpte", "PDPTEs of PAE mode have no R/W, U/S or NX: those bits are reserved there")
_NARROW: Final = ("32-bit", "entries of four bytes have no NX")
_DATA: Final = ("table", "L2's tables are read and written, never fetched")
_ROOT: Final = (
    "page pml5e",
    "all gPAs that this processor has go through one nested PML5E, where the walk for L2's own tables comes first",
)

_WALK: Final = (
    Rule("reached", "15.25.5",
         "Where both dimensions permit the access, it goes to the sPA that the nested walk of its gPA ends in."),
    Rule("canonical", "5.3.1",
         "The bits of a gVA above those that are translated must all equal the highest of them, or the access raises "
         "#GP before any table is read."),
    Rule("canonical.stack", "8.2.13",
         "A reference through the stack segment to an address that is not canonical raises #SS."),
    Rule("guest.present", "5.4.1",
         "An entry with P=0 ends the guest walk in a #PF with P=0 in its error code; the rest of it is not read."),
    Rule("guest.reserved", "5.4.1",
         "A reserved bit that is set in a present entry ends the guest walk there, in a #PF with RSVD and P set.",
         (("32-bit", "entries of four bytes that map no large page have no reserved bits"),
          ("PAE pdpte none", "without nested paging VMRUN itself is refused for it"))),
    Rule("guest.user", "5.6.1",
         "At CPL 3 only user pages can be reached: those with U/S=1 at every level of the guest walk.", (_PDPTE,)),
    Rule("guest.write", "5.6.2, 5.6.4",
         "A write needs R/W=1 at every level of the guest walk, unless it is a supervisor's while CR0.WP=0.",
         (_PDPTE,)),
    Rule("guest.smep", "5.6.5",
         "With CR4.SMEP=1 code at CPL 0 to 2 must not be fetched from a user page.", needs=("smep",)),
    Rule("guest.smap", "5.6.6",
         "With CR4.SMAP=1 data of a user page is out of reach at CPL 0 to 2, unless RFLAGS.AC=1; to implicit "
         "references it is at any CPL, whatever RFLAGS.AC says.",
         needs=("smap",)),
    Rule("guest.key", "5.6.7",
         "With CR4.PKE=1 data of a user page whose key has AD set in PKRU is out of reach, and so are writes where it "
         "has WD set; a supervisor's writes only while CR0.WP=1.",
         (("PAE", "protection keys are of long mode"), ("32-bit", "protection keys are of long mode")), ("pku",)),
    Rule("guest.shadow-stack", "5.7.2, 5.7.3",
         "A shadow stack reference needs a page of its own privilege with R/W=0 and D=1 in the leaf, and R/W=1 above.",
         needs=("cet",)),
    Rule("guest.execute", "5.6.3",
         "With EFER.NXE=1 no instruction is fetched through a guest entry that has NX set, at any level and any CPL.",
         (_PDPTE, _NARROW)),
    Rule("nested.present", "15.25.6",
         "A nested entry with P=0 ends the walk in #VMEXIT(NPF) with P=0 in EXITINFO1.", (_ROOT,)),
    Rule("nested.reserved", "15.25.6",
         "A reserved bit that is set in a present nested entry ends the walk in #VMEXIT(NPF) with RSV and P set; "
         "while L1's EFER.NXE=0, NX is such a bit (5.4.1).",
         (_ROOT, ("32-bit", "entries of four bytes that map no large page have no reserved bits"))),
    Rule("nested.user", "15.25.7",
         "Every access of the guest is a user access in the nested dimension, whatever its CPL: U/S must be 1 at "
         "every nested level.", (_PDPTE, _ROOT)),
    Rule("nested.write", "15.25.7",
         "What L2 writes must have R/W=1 at every nested level, whatever either CR0.WP says; and every access to "
         "a guest table counts as a write (15.25.5).",
         (_PDPTE, _ROOT, ("off page pml4e", "without paging what L2 itself writes lies behind the same entry"))),
    Rule("nested.execute", "15.25.7",
         "L2 fetches no instruction through a nested entry that has NX set, at any level, while L1's EFER.NXE=1.",
         (_DATA, _PDPTE, _NARROW)),
    Rule("nested.gmet", "15.25.13",
         "With guest mode execute trap enabled L2 fetches nothing at CPL 0 to 2 from a page with U/S=1 at every nested "
         "level, and U/S decides over nothing else.",
         (_DATA, _PDPTE), ("gmet",)),
    Rule("nested.sss", "15.25.14",
         "With the supervisor shadow stack check enabled L2's supervisor shadow stacks need a page with U/S=0 and NX=1 "
         "in the nested leaf, and R/W=1 at every nested level above it.",
         (("table", "L2's tables are no shadow stacks"), ("off", "without paging L2 has no shadow stacks")),
         ("cet", "sss")),
)

_MEMORY: Final = (
    Rule("ad", "5.4.2, 15.25.5",
         "A walk sets A in each entry that it goes through, and D in the last one for a write; reads of guest "
         "tables set both in the nested dimension; and nothing else in a table changes.",
         (("PAE pdpte", "PDPTEs of PAE mode have no A: that bit is reserved there"), _ROOT)),
    Rule("write", "15.25.5",
         "A write of L2 changes the bytes at the sPA that its walk ends in, and no others."),
)


_EXIT: Final = (
    Rule("exit.vmmcall", "15.9",
         "When all probes are done L2 executes VMMCALL, which L1 intercepts: state is saved as of that instruction."),
    Rule("exit.privileged", "8.2.14",
         "A privileged instruction at a CPL other than 0 raises #GP(0)."),
    Rule("exit.exception", "8.2, 15.12",
         "UD2, DIV by 0, INT3 and INTO raise #UD, #DE, #BP and #OF, and so does, with #UD, what is not there: VMMCALL "
         "that L1 does not intercept, RDPKRU while CR4.PKE=0; the RIP that L1 finds is the "
         "instruction's."),
    Rule("exit.debug", "13.1.4, 15.12.2",
         "RFLAGS.TF has #DB come behind the instruction that begins with it set, and DR6.BS says so; L1 finds the DR6 "
         "that a handler would."),
    Rule("exit.intercept", "15.9, 15.10, 15.11",
         "An instruction that L1 intercepts does nothing: L2 leaves with the state as it was before it; MSRs and ports "
         "are intercepted one by one, by the permission maps."),
    Rule("exit.delivered", "8.9.3, 15.7",
         "An exception or injected event that L1 does not intercept goes through L2's own IDT, and its handler runs."),
    Rule("exit.delivery", "8.9, 15.20",
         "A delivery raises #GP for a vector beyond the IDT's limit, for a gate that is none, and for an event that an "
         "instruction raises, an injected one too, if the gate's DPL is below the CPL; and #NP for a gate that is not "
         "present."),
    Rule("exit.double-fault", "8.2.9, 15.7.3",
         "What is raised while an exception is delivered is intercepted as such; else two contributory exceptions, or "
         "either of #PF and a contributory one behind #PF, make a #DF, and one of them behind #DF a shutdown."),
    Rule("exit.host", "15.6",
         "#VMEXIT gives L1 back the registers that VMRUN saved."),
    Rule("exit.host-dr7", "15.6",
         "#VMEXIT disables all breakpoints in L1's DR7."),
    Rule("exit.registers", "15.5.1, 15.6",
         "Registers that are not in the VMCB pass through VMRUN and #VMEXIT as they are."),
)

_VMRUN: Final = (
    Rule("vmrun.efer-svme", "15.5.1", "VMRUN is refused if EFER.SVME is 0 in the VMCB."),
    Rule("vmrun.cr0-nw", "15.5.1", "VMRUN is refused if CR0.NW is 1 while CR0.CD is 0."),
    Rule("vmrun.cr0-high", "15.5.1", "VMRUN is refused if a bit of CR0[63:32] is set."),
    Rule("vmrun.cr3-mbz", "15.5.1",
         "VMRUN is refused if a bit of CR3 that must be zero is set: in long mode, one above MAXPHYADDR."),
    Rule("vmrun.cr4-mbz", "15.5.1",
         "VMRUN is refused if a bit of CR4 is set that is reserved, or of a feature that the processor lacks."),
    Rule("vmrun.dr6-high", "15.5.1", "VMRUN is refused if a bit of DR6[63:32] is set."),
    Rule("vmrun.dr7-high", "15.5.1", "VMRUN is refused if a bit of DR7[63:32] is set."),
    Rule("vmrun.efer-mbz", "15.5.1", "VMRUN is refused if a bit of EFER that must be zero is set."),
    Rule("vmrun.no-long-mode", "15.5.1",
         "VMRUN is refused if EFER.LME or EFER.LMA is 1 on a processor without long mode.",
         (("", "no processor that L1 runs on is without long mode"),)),
    Rule("vmrun.long-pae", "15.5.1", "VMRUN is refused if EFER.LME and CR0.PG are 1 while CR4.PAE is 0."),
    Rule("vmrun.long-pe", "15.5.1", "VMRUN is refused if EFER.LME and CR0.PG are 1 while CR0.PE is 0."),
    Rule("vmrun.cs-l-d", "15.5.1", "VMRUN into long mode is refused if CS.L and CS.D are both 1."),
    Rule("vmrun.intercept", "15.5.1", "VMRUN is refused if the VMCB does not intercept VMRUN itself."),
    Rule("vmrun.permission-maps", "15.5.1, 15.10.1, 15.11",
         "VMRUN is refused if the MSR or I/O permission map reaches beyond the largest physical address."),
    Rule("vmrun.eventinj", "15.20",
         "VMRUN is refused if EVENTINJ is valid and has a reserved type, or a vector that is no exception's."),
    Rule("vmrun.eventinj-mode", "15.20",
         "VMRUN is refused if EVENTINJ has an event that is impossible in L2's mode: #OF or #BR in 64-bit mode."),
    Rule("vmrun.asid", "15.5.1, 15.25.1", "VMRUN is refused if ASID is 0, which is the host's."),
    Rule("vmrun.s-cet", "15.5.1", "VMRUN is refused if a reserved bit of S_CET is set.", needs=("cet",)),
    Rule("vmrun.cet-wp", "15.5.1", "VMRUN is refused if CR4.CET is 1 while CR0.WP is 0.", needs=("cet",)),
    Rule("vmrun.cet-vm", "15.5.1",
         "VMRUN is refused if CR4.CET, U_CET's shadow stack enable and RFLAGS.VM are 1 together.",
         (("", "L1 leaves U_CET at 0, and L2 has no virtual-8086 mode"),)),
    Rule("vmrun.pdpe", "15.5.1",
         "VMRUN into PAE paging without nested paging is refused if a reserved bit of one of the four PDPEs is set."),
    Rule("vmrun.v-nmi", "15.21.10",
         "VMRUN is refused if NMI virtualization is enabled while NMIs are not intercepted.", needs=("vnmi",)),
    Rule("vmrun.x2avic", "15.29.4", "VMRUN is refused if x2AVIC is enabled without AVIC.",
         needs=("avic", "x2avic")),
    Rule("vmrun.avic-pointers", "15.29.4",
         "VMRUN with AVIC is refused if the backing page or a table of AVIC lies beyond the physical addresses.",
         needs=("avic",)),
    Rule("vmrun.avic-index", "15.29.4",
         "VMRUN with AVIC is refused if AVIC_PHYSICAL_MAX_INDEX is above 255, or in x2AVIC mode above 511 "
         "where that is not extended.", needs=("avic",)),
    Rule("vmrun.host-paging", "15.25.3", "VMRUN with nested paging is refused if L1 has paging off."),
    Rule("vmrun.ncr3-mbz", "15.25.4",
         "VMRUN with nested paging is refused if a bit of nCR3 that must be zero is set, such as one above "
         "MAXPHYADDR."),
    Rule("vmrun.g-pat", "15.25.4",
         "VMRUN with nested paging is refused if a field of G_PAT has no legal memory type."),
    Rule("vmrun.sss", "15.25.14",
         "VMRUN is refused if the supervisor shadow stack check is enabled without nested paging.", needs=("sss",)),
)

_NOT_COMPARED: Final = (("", "computed, and compared with nothing"),)

_COMPUTED: Final = (  # shown beside a walk, compared with nothing: see harness.model.memory_type
    Rule("type.pat", "7.8.2, 7.8.4",
         "PAT, PCD and PWT of the leaf select the field of PAT, or of gPAT, that is a page's memory type; PCD and PWT "
         "of CR3 or of the entry above that of a table.", _NOT_COMPARED),
    Rule("type.combined", "15.25.8",
         "With nested paging the guest's type and the nested one are combined by table 15-19; WC+ is where they "
         "disagree over caching.", _NOT_COMPARED),
    Rule("type.mtrr", "15.25.8, 7.8.5",
         "The type by PAT is combined with that of the MTRRs for the sPA by table 15-20.", _NOT_COMPARED),
    Rule("type.disabled", "15.25.8, 7.4",
         "CR0.CD of L2, or with nested paging of L1, makes cacheable memory CD.", _NOT_COMPARED),
)

_BY_PROBES: Final = (("", "counted by probes (litmus.md)"),)

_TLB: Final = (
    Rule("tlb.control", "15.16.1",
         "VMRUN with TLB_CONTROL=1 flushes all translations, with 3 those of its ASID, with 7 those of it that are not "
         "global: none of them may be used from then on.", _BY_PROBES),
    Rule("tlb.vmrun", "",
         "This machine is known to keep no translation over VMRUN and #VMEXIT, though the manual would permit it.",
         _BY_PROBES),
    Rule("tlb.asid", "15.16",
         "A guest uses only translations that were loaded under its own ASID, global ones included.", _BY_PROBES),
    Rule("tlb.upgrade", "5.5.3",
         "A fault is confirmed by the tables as they are: what was made present, or given a right, needs no flush.",
         _BY_PROBES),
    Rule("tlb.invlpg", "5.5.3",
         "INVLPG flushes the page of its operand, whatever its size, global or not, and the upper-level entries that "
         "lead to it.", _BY_PROBES),
    Rule("tlb.invlpga", "15.16.2",
         "INVLPGA flushes as INVLPG does, in the ASID that it names.", _BY_PROBES),
    Rule("tlb.cr3", "5.5.2, 5.5.3",
         "MOV to CR3 flushes all translations of the ASID that are not global; with PCIDs those of the new one, or "
         "none if bit 63 is set.", _BY_PROBES),
    Rule("tlb.cr4", "5.5.3",
         "MOV to CR4 that changes PGE, PAE or PSE, sets PKE or clears PCIDE flushes all translations of the ASID.",
         _BY_PROBES),
    Rule("tlb.cr0", "5.5.3", "MOV to CR0 that changes PG flushes all translations of the ASID.", _BY_PROBES),
)

_OF_KVM: Final = (("", "KVM's, not the manual's: counted by entries"),)

_BY_STOPS: Final = (("", "checked at each #VMEXIT of a foreign L1 (observe.md)"),)

_OBSERVED: Final = (
    Rule("vmrun.legal", "15.5.1", "VMRUN is not refused where none of its checks fails.", _BY_STOPS),
    Rule("exit.saved", "15.6, 15.7.2, 15.20",
         "The state that #VMEXIT saves is one that the processor can be in; EVENTINJ.V is 0 then, and EXITINTINFO has "
         "an event of a type that there is.", _BY_STOPS),
    Rule("exit.control", "15.6",
         "#VMEXIT writes the exit's own fields of the control area and the state that VMRUN loads; nothing else in the "
         "VMCB changes.", _BY_STOPS),
)

_CONTEXT: Final = (
    Rule("context.direct-l1", "",
         "While L1 runs on a host whose nested paging is usable, its MMU context is a direct map of L1-physical "
         "memory.", _OF_KVM),
    Rule("context.vmrun", "",
         "The hypervisor under L1 takes NP_ENABLE and nCR3 (without nested paging CR3) from the VMCB that L1 runs.",
         _OF_KVM),
    Rule("context.nested", "",
         "From a VMRUN with NP_ENABLE=1 to its #VMEXIT the MMU context shadows the table at nCR3, in the format of "
         "L1's mode at VMRUN, whatever exits L0 handles itself in between.", _OF_KVM),
    Rule("context.direct-l2", "",
         "From a VMRUN with NP_ENABLE=0 to its #VMEXIT the MMU context stays a direct map, one that is L2's, while the "
         "host's nested paging is usable.", _OF_KVM),
    Rule("context.guest-table", "",
         "Without usable nested paging in the host every guest that has paging on runs on a shadow of its own tables.",
         _OF_KVM),
    Rule("context.back", "",
         "A #VMEXIT that L1 sees switches back to the MMU context that L1 had before VMRUN.", _OF_KVM),
)

_BY_LEAVES: Final = (("", "KVM's, not the manual's: counted by leaves (shadow.md)"),)

_SHADOW: Final = (
    Rule("shadow.frame", "",
         "A leaf of a shadow maps the memory that L1's nested table names for that gPA, where L0's slots and page map "
         "have it, and there is none where L1's table maps nothing.", _BY_LEAVES),
    Rule("shadow.rights", "",
         "A leaf of a shadow grants no right that L1's entries, L0's slot and L0's page map do not all grant.",
         _BY_LEAVES),
    Rule("shadow.ad", "",
         "While A is clear in one of L1's entries a shadow has no leaf for it, and while D is clear in the last one "
         "none that can be written through, since nothing would set the bit.", _BY_LEAVES),
    Rule("shadow.type", "",
         "A leaf has L1's memory as write-back, as L0 has it: whatever L1's table says, one page in two types is not "
         "coherent.", _BY_LEAVES),
    Rule("shadow.stale", "",
         "What L1's table no longer permits is gone from a shadow at the next VMRUN, and at once from a table that the "
         "hypervisor holds to be in step.", _BY_LEAVES),
    Rule("shadow.table", "",
         "A table of a shadow is the one that the hypervisor keeps for L1's table, or for that part of L1's large "
         "page.", _BY_LEAVES),
    Rule("shadow.tracked", "",
         "L1's nested table cannot be written through any leaf while the hypervisor relies on being told of each "
         "write.", _BY_LEAVES),
    Rule("shadow.direct", "",
         "The direct map that L1 runs on, or L2 without nested paging, has L1's memory slots, each page where L0 has "
         "it, and nothing else.", _BY_LEAVES),
)

_LOCKSTEP: Final = (
    Rule("lockstep", "",
         "L1 did not do what its program says: this is about the probe hypervisor or its memory, not about VMRUN."),
)

_ALL: Final = (*_WALK, *_MEMORY, *_EXIT, *_VMRUN, *_COMPUTED, *_TLB, *_OBSERVED, *_CONTEXT, *_SHADOW, *_LOCKSTEP)

RULES: Final[dict[str, Rule]] = {rule.id: rule for rule in _ALL}
"""Every rule by its id."""
