/*
 * L1's own registers, and VMRUN, behind which a machine that errs may have left others in them. L1 reads them, for the
 * checker, and puts back what it needs.
 */
#include "l1.h"

enum {
	DR7_NONE = 0x400,
	CR0_PG = 1u << 31,
	CR3_PWT = 1 << 3,	/* so that CR3 has more than an address, which #VMEXIT is to restore */
	CR4_PSE = 1 << 4,
	CR4_PAE = 1 << 5,
	CR4_LA57 = 1 << 12,
	CR4_PKE = 1 << 22,
	EFER_LME = 1 << 8,
	EFER_LMA = 1 << 10,
	MSR_EFER = 0xc0000080,
	MSR_PAT = 0x277,
	MSR_VM_HSAVE_PA = 0xc0010117,
};

extern uint64_t l1_pml4[], l1_pml5[], l1_pd[], l1_pae_pdpt[];
extern uint32_t l1_legacy_pd[];
extern struct { uint64_t cr3, cr4, efer, pg; } l1_legacy;
extern struct { uint64_t cr4, efer; } l1_long;
extern uint64_t l1_ud_gate;
extern uint32_t l1_vmrun_raised;
extern uint64_t l1_vmrun_rflags;
extern uint32_t l1_vmrun_gif;
void l1_ud(void);
void l1_vmrun(uint64_t vmcb, const void *vmload);
void l1_vmrun_legacy(uint64_t vmcb);
void l1_switch(uint64_t cr3);

uint8_t tw_host_save[PAGE] __attribute__((aligned(PAGE)));

/* Whether L1 is to read its dear registers behind the next VMRUN (see vmrun_long). */
static uint32_t read_is_due = 1;

#define READ(reg) ({ uint64_t value_; __asm__ volatile("mov %%" #reg ", %0" : "=r"(value_)); value_; })
#define SET(reg, value) __asm__ volatile("mov %0, %%" #reg : : "r"((uint64_t)(value)) : "memory")

/*
 * L1's registers that a hypervisor under it makes dear: each read or write is a #VMEXIT. What is in them is
 * remembered here, so that they are written only where that changes something.
 */
static struct tw_host own;
static uint64_t own_pkru;
static uint32_t knows_pkru;

static void read_dear(struct tw_host *to)
{
	to->cr4 = READ(cr4);
	to->dr6 = READ(dr6);
	to->dr7 = READ(dr7);
	to->efer = rdmsr(MSR_EFER);
	to->pat = rdmsr(MSR_PAT);
	to->all_read = 1;
}

/* After a #VMEXIT: what the machine did not restore. PAT and DR7 are the same in all modes of L1. */
static void put_back(void)
{
	const struct tw_host *now = &l1_host_after;

	if (now->pat != own.pat)
		wrmsr(MSR_PAT, own.pat);
	if (now->dr7 != own.dr7)
		SET(dr7, own.dr7);
}

static void put_back_long(void)
{
	const struct tw_host *now = &l1_host_after;

	if (now->cr4 != own.cr4)
		SET(cr4, own.cr4);
	if (now->efer != own.efer)
		wrmsr(MSR_EFER, own.efer);
}

/* L1's paging at VMRUN, and so the format of its nested tables. */
static uint32_t host_mode = TW_HOST_MODE_LONG4;

void host_mode_set(uint32_t mode)
{
	if ((mode == TW_HOST_MODE_LONG5) != (host_mode == TW_HOST_MODE_LONG5)) {
		own.cr4 ^= CR4_LA57;
		l1_long.cr4 = own.cr4;
		l1_long.efer = own.efer;
		l1_switch((uint64_t)(mode == TW_HOST_MODE_LONG5 ? l1_pml5 : l1_pml4) | CR3_PWT);
	}
	host_mode = mode;
}

static void make_other_tables(void)
{
	l1_pml5[0] = l1_pml5[511] = (uint64_t)l1_pml4 | 3;
	l1_ud_gate = ((uint64_t)l1_ud & 0xffff) | 0x8e0000200000 | (uint64_t)l1_ud >> 16 << 48;	/* CS 20h: 32-bit code */
	for (uint64_t i = 0; i < 1024; i++)
		l1_legacy_pd[i] = i << 22 | 0xe3;	/* P, RW, A, D, PS */
}

enum { VMLOADED = 16 };
static const uint16_t vmloaded[VMLOADED] = { TW_VMLOADED };

static void take_vmloaded(uint64_t *to, uint64_t vmcb)
{
	for (int i = 0; i < VMLOADED; i++)
		to[i] = *(uint64_t *)(vmcb + vmloaded[i]);
}

/*
 * What VMLOAD loads, in a page of its own. The VMCB has the complement of each field then, so that VMRUN is found to load
 * one that is VMLOAD's, and #VMEXIT to write one that is VMSAVE's.
 */
uint8_t l1_vmload_page[PAGE] __attribute__((aligned(PAGE)));

static void put_vmloaded(uint64_t vmcb, const uint64_t *from, uint64_t flipped)
{
	for (int i = 0; i < VMLOADED; i++)
		*(volatile uint64_t *)(vmcb + vmloaded[i]) = from[i] ^ flipped;
}

static void lay_out(uint64_t vmcb, const uint64_t *wanted)
{
	put_vmloaded((uint64_t)l1_vmload_page, wanted, 0);
	put_vmloaded(vmcb, wanted, -1ull);
}

/* VMSAVE; first its fields are overwritten, so that one that it leaves out does not pass for saved. */
static void vmsave(uint64_t vmcb)
{
	for (int i = 0; i < VMLOADED; i++)
		*(volatile uint64_t *)(vmcb + vmloaded[i]) = 0x5a5a5a5a5a5a5a5a;
	__asm__ volatile("vmsave %%rax" : : "a"(vmcb) : "memory");
}

/* VMSAVE behind a #VMEXIT; a field that is no longer what it was `laid` out as is told as its complement. */
static void vmsave_behind(uint64_t vmcb, const uint64_t *laid, uint64_t flipped)
{
	uint64_t behind[VMLOADED];

	take_vmloaded(behind, vmcb);
	vmsave(vmcb);
	for (int i = 0; i < VMLOADED; i++)
		if (behind[i] != (laid[i] ^ flipped))
			*(volatile uint64_t *)(vmcb + vmloaded[i]) ^= -1ull;
}

static int same(const void *one, const void *other, uint64_t bytes)
{
	for (uint64_t i = 0; i < bytes / 8; i++)
		if (((const uint64_t *)one)[i] != ((const uint64_t *)other)[i])
			return 0;
	return 1;
}

/*
 * What VMSAVE saved last, which the processor holds still, if it does not err; and what it was found to hold instead.
 * A VMSAVE may have been left out since (vmrun_long).
 */
static uint64_t held[VMLOADED], found[VMLOADED];
static uint32_t knows_held, vmsave_is_due, is_spoilt;

static void look_what_is_held(void)
{
	static uint8_t spare[PAGE] __attribute__((aligned(PAGE)));
	uint64_t now[VMLOADED];

	if (!vmsave_is_due)
		return;
	vmsave_is_due = 0;
	vmsave((uint64_t)spare);
	take_vmloaded(now, (uint64_t)spare);
	if (is_spoilt || same(now, held, sizeof(held)))
		return;
	copy64(found, now, sizeof(found));
	is_spoilt = 1;
}

/* What a machine that errs may make L1's own registers of behind a #VMEXIT: the exit, and L2's registers. */
struct likeness {
	uint64_t exit_code, np_control, efer[2], cr4_to_dr6[2][5], g_pat[2];	/* before VMRUN, and behind it */
};

static struct likeness last_read;

static void take_likeness(struct likeness *of, uint64_t vmcb, int behind)
{
	of->exit_code = *(uint64_t *)(vmcb + VMCB_EXIT_CODE);
	of->np_control = *(uint64_t *)(vmcb + VMCB_NP_CONTROL);
	of->efer[behind] = *(uint64_t *)(vmcb + VMCB_EFER);
	copy64(of->cr4_to_dr6[behind], (void *)(vmcb + VMCB_CR4), sizeof(of->cr4_to_dr6[behind]));
	of->g_pat[behind] = *(uint64_t *)(vmcb + VMCB_G_PAT);
}

/*
 * VMRUN in long mode. Where L1 spares, it leaves out a VMLOAD of what the processor holds; and it executes VMSAVE and
 * reads its dear registers behind the first VMRUN of a program or of a case, and where one is not like the last
 * behind which it did. What a machine spoils all the same stays spoilt: it is found at the next reading, at the
 * program's end (SYNC) at the latest. `plain`: L2 is to do nothing but access memory.
 */
static void vmrun_long(uint64_t vmcb, int plain)
{
	uint64_t wanted[VMLOADED], flipped = 0;
	struct likeness like;

	take_vmloaded(wanted, vmcb);
	if (!shared->sparing || !knows_held || !same(held, wanted, sizeof(held))) {
		look_what_is_held();
		lay_out(vmcb, wanted);
		flipped = -1ull;
	}
	take_likeness(&like, vmcb, 0);
	l1_host_before.cr4 = own.cr4;
	l1_host_before.efer = own.efer;
	l1_vmrun(vmcb, flipped ? l1_vmload_page : 0);
	if (l1_host_after.cr0 != l1_host_before.cr0)
		SET(cr0, l1_host_before.cr0);
	if (l1_host_after.cr8 != l1_host_before.cr8)
		SET(cr8, l1_host_before.cr8);
	take_likeness(&like, vmcb, 1);
	if (shared->sparing && plain && !read_is_due && same(&like, &last_read, sizeof(like))) {
		l1_host_after.all_read = 0;
		vmsave_is_due = 1;
		put_vmloaded(vmcb, wanted, 0);
		return;
	}
	vmsave_behind(vmcb, wanted, flipped);
	vmsave_is_due = 0;
	read_dear(&l1_host_after);
	put_back();
	put_back_long();
	last_read = like;
	read_is_due = !plain || own.dr7 != DR7_NONE;
}

static void vmrun_legacy(uint64_t vmcb)
{
	uint64_t wanted[VMLOADED];

	look_what_is_held();
	take_vmloaded(wanted, vmcb);
	lay_out(vmcb, wanted);
	l1_long.cr4 = own.cr4;
	l1_long.efer = own.efer;
	l1_legacy.efer = own.efer & ~(uint64_t)(EFER_LME | EFER_LMA);
	l1_legacy.cr4 = own.cr4;
	l1_legacy.cr3 = (uint64_t)l1_pae_pdpt | CR3_PWT;
	for (uint64_t i = 0; i < 4; i++)	/* anew: QEMU TCG sets A in them, a reserved bit */
		l1_pae_pdpt[i] = ((uint64_t)l1_pd + i * PAGE) | 1;
	l1_legacy.pg = host_mode == TW_HOST_MODE_OFF ? 0 : CR0_PG;
	if (host_mode == TW_HOST_MODE_LEGACY) {
		l1_legacy.cr4 = (l1_legacy.cr4 & ~(uint64_t)CR4_PAE) | CR4_PSE;
		l1_legacy.cr3 = (uint64_t)l1_legacy_pd | CR3_PWT;
	}
	l1_host_before.cr4 = l1_legacy.cr4;
	l1_host_before.efer = l1_legacy.efer;
	l1_host_before.tsc = l1_host_after.tsc = 0;	/* not read there */
	l1_vmrun_legacy(vmcb);
	if (l1_vmrun_raised)
		put_vmloaded(vmcb, wanted, 0);
	put_back();
	read_is_due = 1;
}

void host_vmrun(uint64_t vmcb, int plain)
{
	l1_host_before.pat = own.pat;
	l1_host_before.dr7 = own.dr7;
	if (host_mode == TW_HOST_MODE_LONG4 || host_mode == TW_HOST_MODE_LONG5)
		vmrun_long(vmcb, plain);
	else
		vmrun_legacy(vmcb);
	take_vmloaded(held, vmcb);
	knows_held = !l1_vmrun_raised;
	if (l1_vmrun_raised) {
		l1_vmrun_raised = 0;
		*(uint64_t *)(vmcb + VMCB_EXIT_CODE) = TW_VMRUN_RAISED | 6;
	}
}

/* PKRU is out of reach while CR4.PKE is 0, as it is for L1. */
static void set_pkru(uint32_t value)
{
	if (!(shared->features & TW_FEATURE_PKU) || (knows_pkru && own_pkru == value))
		return;
	SET(cr4, own.cr4 | CR4_PKE);
	__asm__ volatile("wrpkru" : : "a"(value), "c"(0), "d"(0));
	SET(cr4, own.cr4);
	own_pkru = value;
	knows_pkru = 1;
}

static uint64_t *own_register(uint32_t reg)
{
	switch (reg) {
	case TW_HOST_CR4: return &own.cr4;
	case TW_HOST_EFER: return &own.efer;
	case TW_HOST_PAT: return &own.pat;
	default: return &own.dr7;
	}
}

void host_set(uint32_t reg, uint64_t value)
{
	read_is_due = 1;
	switch (reg) {
	case TW_HOST_PKRU: set_pkru(value); return;
	case TW_HOST_RFLAGS: l1_vmrun_rflags = value; return;
	case TW_HOST_GIF: l1_vmrun_gif = value; return;
	case TW_HOST_CR8:
		if (value != own.cr8)
			SET(cr8, value);
		own.cr8 = value;
		return;
	case TW_HOST_NMI: pending_set(1, value); return;
	case TW_HOST_INTERRUPT: pending_set(0, value); return;
	}
	if (reg == TW_HOST_CR4 && host_mode == TW_HOST_MODE_LONG5)
		value |= CR4_LA57;
	if (value == (reg == TW_HOST_CR0 ? READ(cr0) : *own_register(reg)))
		return;
	switch (reg) {
	case TW_HOST_CR0: SET(cr0, value); break;
	case TW_HOST_CR4: SET(cr4, value); own.cr4 = READ(cr4); break;
	case TW_HOST_DR7: SET(dr7, value); own.dr7 = READ(dr7); break;
	case TW_HOST_EFER: wrmsr(MSR_EFER, value); own.efer = rdmsr(MSR_EFER); break;
	case TW_HOST_PAT: wrmsr(MSR_PAT, value); own.pat = rdmsr(MSR_PAT); break;
	}
}

void host_is_due(void)
{
	read_is_due = 1;
}

void host_pkru_is_written(void)
{
	knows_pkru = 0;
}

/* At a program's end all that L1 did without is read. */
void host_at_end(struct tw_record *record)
{
	read_dear(&l1_host_after);
	record->before = own;
	record->after = l1_host_after;
	put_back();
	put_back_long();
	look_what_is_held();
	copy64(record->results, held, sizeof(held));
	copy64(record->results + VMLOADED, is_spoilt ? found : held, sizeof(held));
	is_spoilt = 0;
}

void host_begin(void)
{
	make_other_tables();
	read_dear(&own);
	wrmsr(MSR_VM_HSAVE_PA, (uint64_t)tw_host_save);
}
