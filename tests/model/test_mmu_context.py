"""The state machine of MMU contexts: the three steps that it is about, every order of them, and what a
context depends on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.model.mmu_context import Capability, Context, Maps, Mode, Vcpu
from harness.model.registers import CR0, CR4, EFER

PAGING = CR0.PG | CR0.PE | CR0.WP
LONG = Mode(PAGING, 0x1000, CR4.PAE, EFER.LME | EFER.LMA | EFER.NXE)
LONG5 = LONG._replace(cr4=CR4.PAE | CR4.LA57)
PAE = Mode(PAGING, 0x2000, CR4.PAE, EFER.NXE)
LEGACY = Mode(PAGING, 0x3000, 0, 0)
OFF = Mode(CR0.PE, 0x4000, 0, 0)
MODES = (LONG, LONG5, PAE, LEGACY, OFF)
NCR3 = 0x10_0000

TDP = Capability(tdp_usable=True, root_level=4)
TDP5 = Capability(tdp_usable=True, root_level=5)
SHADOW = Capability(tdp_usable=False)

modes = st.sampled_from(MODES)
hosts = st.sampled_from((TDP, TDP5, SHADOW))


def test_the_three_steps() -> None:
    """L1 on a direct map; VMRUN with NP_ENABLE=1 to a shadow of its nested table; #VMEXIT back."""
    l1 = Vcpu(TDP, LONG)
    assert l1.context.direct_map
    assert l1.context.root is None
    l2 = l1.vmrun(OFF, True, NCR3)
    assert not l2.context.direct_map
    assert (l2.context.maps, l2.context.root, l2.context.walked_level) == (Maps.NESTED_TABLE, NCR3, 4)
    assert l2.context.two_dimensional
    assert l2.vmexit() == l1


def test_without_nested_paging_the_map_stays_direct() -> None:
    """tdp_usable is the host's, direct_map the context's: NP_ENABLE=0 changes neither, but L2 has a direct map
    of its own."""
    l1 = Vcpu(TDP, LONG)
    l2 = l1.vmrun(PAE, False, NCR3)
    assert l2.context.direct_map
    assert l2.context.role.guest_mode == 1
    assert l1.context.role.guest_mode == 0
    assert l2.context._replace(role=l1.context.role) == l1.context


@pytest.mark.parametrize(
    ("l1", "walked", "four_byte", "nx"),
    [(LONG, 4, 0, 1), (LONG5, 5, 0, 1), (PAE, 3, 0, 1), (LEGACY, 2, 1, 0)],
)
def test_the_format_of_the_nested_table_is_l1s(l1: Mode, walked: int, four_byte: int, nx: int) -> None:
    """15.25.3: what L1's mode is at VMRUN; the shadow's own levels are L0's, with 8-byte entries."""
    context = Vcpu(TDP, l1).vmrun(LONG, True, NCR3).context
    role = context.role
    assert (context.walked_level, role.level, role.has_4_byte_gpte, role.efer_nx) == (walked, 4, four_byte, nx)


@pytest.mark.parametrize(("l1", "through"), [(LONG, 1), (LONG5, 0), (PAE, 0), (LEGACY, 0)])
def test_five_levels_over_four(l1: Mode, through: int) -> None:
    """Only a 4-level table gets a fifth level of one entry; a 5-level one has its own, PAE's roots are apart."""
    assert Vcpu(TDP5, l1).vmrun(LONG, True, NCR3).context.role.passthrough == through
    assert Vcpu(TDP, l1).vmrun(LONG, True, NCR3).context.role.passthrough == 0


@pytest.mark.parametrize("bits", [CR0.WP, 0])
def test_host_wp_smep_smap_have_no_part(bits: int) -> None:
    """15.25.7: a context that depended on them would be rebuilt for nothing."""
    one = LONG._replace(cr0=CR0.PG | CR0.PE | bits, cr4=CR4.PAE | CR4.SMEP | CR4.SMAP)
    assert Vcpu(TDP, one).vmrun(LONG, True, NCR3).context == Vcpu(TDP, LONG).vmrun(LONG, True, NCR3).context


@pytest.mark.parametrize("np_enable", [False, True])
@pytest.mark.parametrize("l2", [m for m in MODES if m is not OFF])
def test_without_tdp_every_paged_guest_is_shadowed(l2: Mode, np_enable: bool) -> None:
    vcpu = Vcpu(SHADOW, LONG)
    assert (vcpu.context.maps, vcpu.context.root) == (Maps.GUEST_TABLE, LONG.cr3)
    inside = vcpu.vmrun(l2, np_enable, NCR3).context
    assert (inside.maps, inside.root, inside.walked_level) == (Maps.GUEST_TABLE, l2.cr3, l2.levels)
    assert inside.role.level == max(3, l2.levels)
    assert not inside.two_dimensional


def test_without_tdp_and_without_paging_there_is_nothing_to_shadow() -> None:
    context = Vcpu(SHADOW, LONG).vmrun(OFF, False, NCR3).context
    assert context.direct_map
    assert context.role.level == 3


@pytest.mark.parametrize(
    ("cr0", "cr4", "bits"),
    [
        (PAGING, CR4.PAE | CR4.SMEP | CR4.SMAP, (1, 0, 0)),
        (PAGING & ~CR0.WP, CR4.PAE | CR4.SMEP, (0, 1, 0)),
        (PAGING & ~CR0.WP, CR4.PAE | CR4.SMAP, (0, 0, 1)),
    ],
)
def test_bits_of_a_shadowed_guest(cr0: int, cr4: int, bits: tuple[int, int, int]) -> None:
    """SMEP and SMAP are told apart from WP's emulation only where WP=0."""
    role = Vcpu(SHADOW, LONG._replace(cr0=cr0, cr4=cr4)).context.role
    assert (role.cr0_wp, role.smep_andnot_wp, role.smap_andnot_wp) == bits


def test_another_ncr3_counts_from_the_next_vmrun_on() -> None:
    l1 = Vcpu(TDP, LONG)
    one, other = (l1.vmrun(LONG, True, root) for root in (NCR3, NCR3 + 0x1000))
    assert one.context.root == NCR3
    assert other.context.root == NCR3 + 0x1000
    assert one.vmexit() == other.vmexit()
    assert one.context._replace(root=None) == other.context._replace(root=None)


@given(hosts, modes, modes, st.booleans())
def test_vmexit_undoes_vmrun(host: Capability, l1: Mode, l2: Mode, np_enable: bool) -> None:
    before = Vcpu(host, l1)
    assert before.vmrun(l2, np_enable, NCR3).vmexit() == before
    assert before.vmrun(l2, np_enable, NCR3).vmexit().context == before.context


@given(hosts, modes, modes, modes, st.booleans())
def test_exits_that_l0_handles_switch_nothing(host: Capability, l1: Mode, l2: Mode, later: Mode, np: bool) -> None:
    inside = Vcpu(host, l1).vmrun(l2, np, NCR3)
    assert inside.handled_by_l0().context == inside.context
    assert inside.l2_writes(later).handled_by_l0().context == inside.l2_writes(later).context


@given(st.sampled_from((TDP, TDP5)), modes, modes, modes, st.booleans())
def test_with_tdp_no_register_of_the_running_guest_matters(
    host: Capability, l1: Mode, l2: Mode, later: Mode, np_enable: bool
) -> None:
    """Its tables are walked by the processor: what it writes to CR0, CR3, CR4 or EFER switches nothing."""
    assert Vcpu(host, l1).l1_writes(later).context == Vcpu(host, l1).context
    inside = Vcpu(host, l1).vmrun(l2, np_enable, NCR3)
    assert inside.l2_writes(later).context == inside.context


@given(modes, modes, modes)
def test_without_tdp_every_register_write_counts(l1: Mode, l2: Mode, later: Mode) -> None:
    assert Vcpu(SHADOW, l1).l1_writes(later).context == Vcpu(SHADOW, later).context
    inside = Vcpu(SHADOW, l1).vmrun(l2, False, NCR3)
    assert inside.l2_writes(later).context == Vcpu(SHADOW, l1).vmrun(later, False, NCR3).context
    assert inside.l2_writes(later).vmexit().context == Vcpu(SHADOW, l1).context


def _all_contexts() -> list[Context]:
    inside = [Vcpu(host, l1).vmrun(l2, np, NCR3).context for host in (TDP, TDP5, SHADOW) for l1 in MODES
              for l2 in MODES for np in (False, True) if l1.levels or not np]
    return inside + [Vcpu(host, l1).context for host in (TDP, TDP5, SHADOW) for l1 in MODES]


@pytest.mark.parametrize("context", dict.fromkeys(_all_contexts()), ids=str)
def test_what_holds_for_every_context(context: Context) -> None:
    """A direct map shadows nobody's table and a shadow has one; L1's own table is walked in software in two
    dimensions only while it is shadowed; tables of 32-bit entries have two levels."""
    assert context.direct_map == (context.root is None) == (context.walked_level == 0)
    assert context.role.direct == int(context.direct_map)
    assert context.two_dimensional == (context.maps is Maps.NESTED_TABLE)
    assert context.role.has_4_byte_gpte == int(context.walked_level == 2)
    assert context.role.level >= max(3, context.walked_level) or context.maps is Maps.NESTED_TABLE
    assert ("L2" if context.role.guest_mode else "L1") in str(context)
