/*
 * L1, the probe hypervisor: interprets the program in the op ring, and posts a record right before
 * each VMRUN and right after each #VMEXIT. It knows nothing of page tables, of the VMCB's layout
 * (but for the few offsets below) or of what should happen: that is all the checker's.
 */
#include "second.h"

enum {
	VMCB_EXIT_CODE = 0x70,
	VMCB_NP_CONTROL = 0x90,
	VMCB_SAVE = 0x400,
	VMCB_CPL = 0x4cb,
	VMCB_EFER = 0x4d0,
	VMCB_CR4 = 0x548,
	VMCB_DR7 = 0x560,
	VMCB_DR6 = 0x568,
	VMCB_RFLAGS = 0x570,
	VMCB_RIP = 0x578,
	VMCB_RSP = 0x5d8,
	VMCB_G_PAT = 0x668,
	DR7_NONE = 0x400,
	EXIT_NMI = 0x61,
	EXIT_VMMCALL = 0x81,
	EXIT_INVALID = -1,
	CR0_PG = 1u << 31,
	CR4_PSE = 1 << 4,
	CR4_PAE = 1 << 5,
	CR4_LA57 = 1 << 12,
	EFER_LME = 1 << 8,
	EFER_LMA = 1 << 10,
	CR4_PKE = 1 << 22,
	MSR_EFER = 0xc0000080,
	MSR_PAT = 0x277,
	MSR_VM_HSAVE_PA = 0xc0010117,
	MSR_VM_CR = 0xc0010114,
	PAGE = 4096,
};

/* From l1.ld: the tables, the data pages, and the copies in which L1 remembers both. */
extern uint8_t tw_arena[], tw_arena_end[], tw_data[], tw_data_end[], tw_mirror_offset[];

extern struct tw_regs l1_regs;
extern struct tw_host l1_host_before, l1_host_after;
extern uint64_t l1_spin_rip;
extern uint64_t l1_pml4[], l1_pml5[], l1_pd[], l1_pae_pdpt[];
extern uint32_t l1_legacy_pd[];
extern struct { uint64_t cr3, cr4, efer, pg; } l1_legacy;
extern struct { uint64_t cr4, efer; } l1_long;
extern uint64_t l1_ud_gate;
extern uint32_t l1_vmrun_raised;
void l1_ud(void);
void l1_vmrun(uint64_t vmcb, uint32_t vmload);
void l1_vmrun_legacy(uint64_t vmcb);
void l1_switch(uint64_t cr3);
void l1_spin(uint64_t vmcb, uint64_t count);

struct tw_shared tw_shared_page __attribute__((aligned(PAGE)));
struct tw_op tw_op_ring[TW_OP_SLOTS] __attribute__((aligned(PAGE)));
struct tw_record tw_record_ring[TW_RECORD_SLOTS] __attribute__((aligned(PAGE)));
struct tw_probe tw_mailbox[PAGE / sizeof(struct tw_probe)] __attribute__((aligned(PAGE)));
uint8_t tw_host_save[PAGE] __attribute__((aligned(PAGE)));

static volatile struct tw_shared *const shared = &tw_shared_page;

enum { ARENA_PAGES = 512, DATA_PAGES = 1536, BANK_PAGES = ARENA_PAGES + DATA_PAGES, MAX_PAGES = 2 * BANK_PAGES };
static uint64_t *watched[MAX_PAGES];
static uint32_t watched_count;
static uint64_t *touched[MAX_PAGES];
static uint32_t touched_count;
static uint8_t is_touched[MAX_PAGES];

/* What quadwords held before they were changed, since the mark: a rewind puts them back, last first. */
enum { UNDO = 1 << 14 };
static struct { uint64_t *at, value; } undo[UNDO];
static uint32_t undo_count;
/* Whether L1 is to read its dear registers behind the next VMRUN (see vmrun_long). */
static uint32_t read_is_due = 1;
static uint8_t marked_vmcb[PAGE] __attribute__((aligned(PAGE)));

static inline uint64_t rdmsr(uint32_t msr)
{
	uint32_t low, high;
	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
	return (uint64_t)high << 32 | low;
}

static inline void wrmsr(uint32_t msr, uint64_t value)
{
	__asm__ volatile("wrmsr" : : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

static inline void cpuid(uint32_t leaf, uint32_t *a, uint32_t *b, uint32_t *c, uint32_t *d)
{
	*a = leaf;
	*c = 0;
	__asm__ volatile("cpuid" : "+a"(*a), "=b"(*b), "+c"(*c), "=d"(*d));
}

static inline void copy64(void *to, const void *from, uint64_t bytes)
{
	uint64_t count = bytes / 8;
	__asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

static inline void fill64(void *to, uint64_t value, uint64_t bytes)
{
	uint64_t count = bytes / 8;
	__asm__ volatile("rep stosq" : "+D"(to), "+c"(count) : "a"(value) : "memory");
}

/* Both banks are the same but for 4 GiB (tw_high in l1.ld): where p is in the low one. */
static const uint64_t HIGH = 1ull << 32;

static inline const uint8_t *low(const void *p)
{
	return (const uint8_t *)((uint64_t)p & ~HIGH);
}

static inline int in_data(const void *p)
{
	return low(p) >= tw_data && low(p) < tw_data_end;
}

static inline int has_mirror(const void *p)
{
	return (low(p) >= tw_arena && low(p) < tw_arena_end) || in_data(p);
}

static inline uint64_t *mirror(uint64_t *p)
{
	return p + (uint64_t)tw_mirror_offset / 8;
}

/* What a data page holds: each quadword is its own name, and code that returns it to L2's stub. */
static inline uint64_t tag(const void *p)
{
	return 0x90e3ff00000000b8 | (uint64_t)p >> 3 << 8;	/* mov $sPA/8, %eax; jmp *%rbx; nop */
}

static inline uint32_t page_index(const uint64_t *page)
{
	uint32_t bank = low(page) == (const uint8_t *)page ? 0 : BANK_PAGES;

	return bank + (in_data(page) ? ARENA_PAGES + (low(page) - tw_data) / PAGE : (low(page) - tw_arena) / PAGE);
}

static void touch(uint64_t *page)
{
	uint32_t index = page_index(page);

	if (!is_touched[index]) {
		is_touched[index] = 1;
		touched[touched_count++] = page;
	}
}

static void remember(uint64_t *at, uint64_t value)
{
	if (undo_count < UNDO) {	/* a machine that changes more is found out at the next SYNC */
		undo[undo_count].at = at;
		undo[undo_count++].value = value;
	}
}

static void mark(uint64_t vmcb)
{
	undo_count = 0;
	copy64(marked_vmcb, (void *)vmcb, PAGE);
}

static void rewind(uint64_t vmcb)
{
	while (undo_count) {
		uint64_t *at = undo[--undo_count].at;

		*at = *mirror(at) = undo[undo_count].value;
	}
	copy64((void *)vmcb, marked_vmcb, PAGE);
	read_is_due = 1;
}

static void reset(void)
{
	undo_count = 0;
	for (uint32_t i = 0; i < touched_count; i++) {
		uint64_t *page = touched[i];

		if (in_data(page))
			for (int w = 0; w < PAGE / 8; w++)
				page[w] = tag(page + w);
		else
			fill64(page, 0, PAGE);
		copy64(mirror(page), page, PAGE);
		is_touched[page_index(page)] = 0;
	}
	touched_count = 0;
	watched_count = 0;
	read_is_due = 1;
}

static void write(uint64_t address, uint64_t value, uint32_t width)
{
	volatile void *p = (volatile void *)address;
	uint64_t *word = (uint64_t *)(address & -8ull);

	if (has_mirror(word))
		remember(word, *word);
	switch (width) {
	case 1: *(volatile uint8_t *)p = value; break;
	case 2: *(volatile uint16_t *)p = value; break;
	case 4: *(volatile uint32_t *)p = value; break;
	default: *(volatile uint64_t *)p = value; break;
	}
	if (has_mirror(word)) {
		*mirror(word) = *(volatile uint64_t *)word;
		touch((uint64_t *)(address & -(uint64_t)PAGE));
	}
}

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

static void set_host_mode(uint32_t mode)
{
	if ((mode == TW_HOST_MODE_LONG5) != (host_mode == TW_HOST_MODE_LONG5)) {
		own.cr4 ^= CR4_LA57;
		l1_long.cr4 = own.cr4;
		l1_long.efer = own.efer;
		l1_switch((uint64_t)(mode == TW_HOST_MODE_LONG5 ? l1_pml5 : l1_pml4));
	}
	host_mode = mode;
}

static void make_other_tables(void)
{
	l1_pml5[0] = (uint64_t)l1_pml4 | 3;
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

/* VMSAVE; first its fields are overwritten, so that one that it leaves out does not pass for saved. */
static void vmsave(uint64_t vmcb)
{
	for (int i = 0; i < VMLOADED; i++)
		*(volatile uint64_t *)(vmcb + vmloaded[i]) = 0x5a5a5a5a5a5a5a5a;
	__asm__ volatile("vmsave %%rax" : : "a"(vmcb) : "memory");
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
	uint64_t wanted[VMLOADED];
	struct likeness like;
	uint32_t vmload;

	take_vmloaded(wanted, vmcb);
	vmload = !shared->sparing || !knows_held || !same(held, wanted, sizeof(held));
	if (vmload)
		look_what_is_held();
	take_likeness(&like, vmcb, 0);
	l1_host_before.cr4 = own.cr4;
	l1_host_before.efer = own.efer;
	l1_vmrun(vmcb, vmload);
	if (l1_host_after.cr0 != l1_host_before.cr0)
		SET(cr0, l1_host_before.cr0);
	if (l1_host_after.cr8 != l1_host_before.cr8)
		SET(cr8, l1_host_before.cr8);
	take_likeness(&like, vmcb, 1);
	if (shared->sparing && plain && !read_is_due && same(&like, &last_read, sizeof(like))) {
		l1_host_after.all_read = 0;
		vmsave_is_due = 1;
		return;
	}
	vmsave(vmcb);
	vmsave_is_due = 0;
	read_dear(&l1_host_after);
	put_back();
	put_back_long();
	last_read = like;
	read_is_due = !plain || own.dr7 != DR7_NONE;
}

static void vmrun_legacy(uint64_t vmcb)
{
	look_what_is_held();
	l1_long.cr4 = own.cr4;
	l1_long.efer = own.efer;
	l1_legacy.efer = own.efer & ~(uint64_t)(EFER_LME | EFER_LMA);
	l1_legacy.cr4 = own.cr4;
	l1_legacy.cr3 = (uint64_t)l1_pae_pdpt;
	for (uint64_t i = 0; i < 4; i++)	/* anew: QEMU TCG sets A in them, a reserved bit */
		l1_pae_pdpt[i] = ((uint64_t)l1_pd + i * PAGE) | 1;
	l1_legacy.pg = host_mode == TW_HOST_MODE_OFF ? 0 : CR0_PG;
	if (host_mode == TW_HOST_MODE_LEGACY) {
		l1_legacy.cr4 = (l1_legacy.cr4 & ~(uint64_t)CR4_PAE) | CR4_PSE;
		l1_legacy.cr3 = (uint64_t)l1_legacy_pd;
	}
	l1_host_before.cr4 = l1_legacy.cr4;
	l1_host_before.efer = l1_legacy.efer;
	l1_vmrun_legacy(vmcb);
	put_back();
	read_is_due = 1;
}

static void vmrun(uint64_t vmcb, int plain)
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

static void set_host(uint32_t reg, uint64_t value)
{
	read_is_due = 1;
	if (reg == TW_HOST_PKRU) {
		set_pkru(value);
		return;
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

static void wait_until_checked(uint64_t lag)
{
	while (shared->record_posted - shared->record_checked > lag)
		__asm__ volatile("pause");
}

static struct tw_record *next_record(uint32_t kind, uint64_t op)
{
	struct tw_record *record;

	wait_until_checked(TW_RECORD_SLOTS - 1);
	record = &tw_record_ring[shared->record_posted % TW_RECORD_SLOTS];
	record->kind = kind;
	record->sequence = shared->record_posted;
	record->op = op;
	record->diffs_found = 0;
	return record;
}

static void post(uint64_t lag)
{
	__asm__ volatile("" : : : "memory");
	shared->record_posted++;
	wait_until_checked(lag);
}

/* Fill in what changed in the watched pages since L1 last looked. */
static void find_changes(struct tw_record *record)
{
	uint32_t found = 0;

	for (uint32_t i = 0; i < watched_count; i++) {
		volatile uint64_t *page = watched[i];
		uint64_t *old = mirror(watched[i]);

		for (int w = 0; w < PAGE / 8; w += 8) {
			if (!((page[w] ^ old[w]) | (page[w + 1] ^ old[w + 1]) |
			      (page[w + 2] ^ old[w + 2]) | (page[w + 3] ^ old[w + 3]) |
			      (page[w + 4] ^ old[w + 4]) | (page[w + 5] ^ old[w + 5]) |
			      (page[w + 6] ^ old[w + 6]) | (page[w + 7] ^ old[w + 7])))
				continue;
			for (int v = w; v < w + 8; v++) {
				uint64_t now = page[v];

				if (now == old[v])
					continue;
				if (found < TW_MAX_DIFFS) {
					record->diffs[found].address = (uint64_t)&page[v];
					record->diffs[found].value = now;
				}
				found++;
				remember((uint64_t *)&page[v], old[v]);
				old[v] = now;
				touch(watched[i]);
			}
		}
	}
	record->diffs_found = found;
}

static void fill_vmcb(struct tw_record *record, uint64_t vmcb)
{
	record->vmcb = vmcb;
	copy64(record->control, (void *)vmcb, TW_CONTROL_BYTES);
	copy64(record->save, (void *)(vmcb + VMCB_SAVE), TW_SAVE_BYTES);
}

/* What L2 has again when it is re-entered behind a fault: a handler of its own may have run. */
struct resume {
	uint64_t segments[8];	/* ES, CS, SS, DS */
	uint64_t rflags, rsp;
	uint8_t cpl;
};

/* The VMCB's save area as VMRUN found it. */
static uint64_t loaded[TW_SAVE_BYTES / 8];

static void run(const struct tw_op *op, const struct tw_probe *probes, uint64_t number)
{
	uint32_t count = op->arg, first = 0;
	uint8_t *save = (uint8_t *)op->a + VMCB_SAVE;
	struct resume begun;
	volatile uint64_t *exit_code = (volatile uint64_t *)(op->a + VMCB_EXIT_CODE);
	int plain = 1, second = 0;

	for (uint32_t i = 0; i < count; i++) {
		tw_mailbox[i] = probes[i];
		second = second || probes[i].kind == TW_PROBE_REMOTE || probes[i].kind == TW_PROBE_REMOTENMI;
		plain = plain && probes[i].kind <= TW_PROBE_INVLPG;
		knows_pkru = knows_pkru && probes[i].kind != TW_PROBE_WRPKRU;
	}
	tw_mailbox[count] = (struct tw_probe){ .kind = TW_PROBE_END };
	if (op->b & -(uint64_t)PAGE)	/* in real mode RIP is an offset: the program has written it */
		*(uint64_t *)((uint8_t *)tw_mailbox + TW_MAILBOX_CODE) = op->b & -(uint64_t)PAGE;
	copy64(begun.segments, save, sizeof(begun.segments));
	begun.cpl = save[VMCB_CPL - VMCB_SAVE];
	begun.rflags = *(uint64_t *)(save + VMCB_RFLAGS - VMCB_SAVE);
	begun.rsp = *(uint64_t *)(save + VMCB_RSP - VMCB_SAVE);
	if (second)
		second_start(tw_mailbox);
	for (;;) {
		struct tw_record *record = next_record(TW_RECORD_ENTER, number);
		uint32_t next;

		l1_regs = (struct tw_regs){
			.rbx = 0xb0b0b0b0b0b0b0b0, .rcx = 0xc1c1c1c1c1c1c1c1, .rdx = 0xd2d2d2d2d2d2d2d2,
			.rdi = 0xd7d7d7d7d7d7d7d7, .rbp = first, .rsi = op->c, .r12 = 0x1212121212121212,
			.r8 = 0x0808080808080808, .r9 = 0x0909090909090909, .r10 = 0x1010101010101010,
			.r11 = 0x1111111111111111, .r13 = 0x1313131313131313, .r14 = 0x1414141414141414,
			.r15 = 0x1515151515151515,
		};
		record->first_probe = record->next_probe = first;
		record->regs = l1_regs;
		fill_vmcb(record, op->a);
		post(shared->lag);

		copy64(loaded, save, sizeof(loaded));
		vmrun(op->a, plain);

		if (*exit_code == EXIT_NMI)
			take_nmi();
		record = next_record(TW_RECORD_EXIT, number);
		next = l1_regs.rbp < first ? first : l1_regs.rbp < count ? l1_regs.rbp : count;
		record->first_probe = first;
		record->next_probe = next;
		record->before = l1_host_before;
		record->after = l1_host_after;
		record->regs = l1_regs;
		fill_vmcb(record, op->a);
		for (uint32_t i = first; i < next; i++)
			record->results[i] = tw_mailbox[i].result;
		find_changes(record);
		/* more than a record holds: the checker must look at the live pages, now */
		post(record->diffs_found > TW_MAX_DIFFS ? 0 : shared->lag);

		if ((uint32_t)*exit_code == (uint32_t)EXIT_INVALID) {
			copy64(save, loaded, sizeof(loaded));	/* what is saved then is not defined */
			break;
		}
		if (*exit_code == EXIT_VMMCALL || next + 1 >= count)
			break;
		first = next + 1;
		copy64(save, begun.segments, sizeof(begun.segments));
		save[VMCB_CPL - VMCB_SAVE] = begun.cpl;
		*(uint64_t *)(save + VMCB_RFLAGS - VMCB_SAVE) = begun.rflags;
		*(uint64_t *)(save + VMCB_RSP - VMCB_SAVE) = begun.rsp;
		*(volatile uint64_t *)(op->a + VMCB_RIP) = op->b;
	}
	if (second)
		second_stop();
}

/* A program's end, at which all that L1 did without is read. */
static void sync(uint64_t number)
{
	struct tw_record *record = next_record(TW_RECORD_SYNC, number);

	read_dear(&l1_host_after);
	record->before = own;
	record->after = l1_host_after;
	put_back();
	put_back_long();
	look_what_is_held();
	copy64(record->results, held, sizeof(held));
	copy64(record->results + VMLOADED, is_spoilt ? found : held, sizeof(held));
	is_spoilt = 0;
	post(0);
}

static void interpret(void)
{
	uint64_t done = 0;

	for (;;) {
		struct tw_op *op = &tw_op_ring[done % TW_OP_SLOTS];
		uint64_t slots = 1;

		while (shared->op_posted == done)
			__asm__ volatile("pause");
		switch (op->code) {
		case TW_OP_RESET:
			reset();
			fill64((void *)op->a, 0, op->b);
			break;
		case TW_OP_WATCH:
			watched[watched_count++] = (uint64_t *)op->a;
			break;
		case TW_OP_WRITE:
			write(op->a, op->b, op->arg);
			break;
		case TW_OP_HOST:
			set_host(op->arg, op->b);
			break;
		case TW_OP_MARK:
			mark(op->a);
			break;
		case TW_OP_REWIND:
			rewind(op->a);
			break;
		case TW_OP_REMOTE:
			second_queue(op);
			break;
		case TW_OP_INVLPGA:
			__asm__ volatile("invlpga" : : "a"(op->a), "c"(op->arg) : "memory");
			break;
		case TW_OP_HOST_MODE:
			set_host_mode(op->arg);
			break;
		case TW_OP_RUN:
			/* the checker posts an op whole and never across the ring's end */
			run(op, (const struct tw_probe *)(op + 1), done);
			slots += op->arg;
			break;
		case TW_OP_SYNC:
			sync(done);
			break;
		case TW_OP_SPIN:
			l1_regs.rsi = op->c;
			l1_spin_rip = *(volatile uint64_t *)(op->a + VMCB_RIP);
			tw_mailbox[0] = (struct tw_probe){ .kind = TW_PROBE_END };
			l1_spin(op->a, op->b);
			break;
		}
		done += slots;
		shared->op_done = done;
	}
}

static uint64_t features(void)
{
	uint32_t a, b, c, d;
	uint64_t have = 0;

	cpuid(1, &a, &b, &c, &d);
	have |= c >> 17 & 1 ? TW_FEATURE_PCID : 0;
	have |= c >> 26 & 1 ? TW_FEATURE_XSAVE : 0;
	have |= d >> 9 & 1 && (b >> 16 & 0xff) > 1 ? TW_FEATURE_SECOND : 0;
	cpuid(7, &a, &b, &c, &d);
	have |= b & 1 ? TW_FEATURE_FSGSBASE : 0;
	have |= c >> 7 & 1 ? TW_FEATURE_CET : 0;
	have |= b >> 7 & 1 ? TW_FEATURE_SMEP : 0;
	have |= b >> 20 & 1 ? TW_FEATURE_SMAP : 0;
	have |= c >> 2 & 1 ? TW_FEATURE_UMIP : 0;
	have |= c >> 3 & 1 ? TW_FEATURE_PKU : 0;
	have |= c >> 16 & 1 ? TW_FEATURE_LA57 : 0;
	cpuid(0x80000001, &a, &b, &c, &d);
	have |= d >> 20 & 1 ? TW_FEATURE_NX : 0;
	have |= d >> 26 & 1 ? TW_FEATURE_PAGE1G : 0;
	have |= d >> 25 & 1 ? TW_FEATURE_FFXSR : 0;
	have |= c >> 17 & 1 ? TW_FEATURE_TCE : 0;
	cpuid(0x80000008, &a, &b, &c, &d);
	have |= b >> 8 & 1 ? TW_FEATURE_MCOMMIT : 0;
	have |= b >> 13 & 1 ? TW_FEATURE_INTWB : 0;
	have |= b >> 20 & 1 ? 0 : TW_FEATURE_LMSLE;	/* the bit says that it is not there */
	cpuid(0x80000000, &a, &b, &c, &d);
	if (a >= 0x80000021) {
		cpuid(0x80000021, &a, &b, &c, &d);
		have |= a >> 7 & 1 ? TW_FEATURE_UAI : 0;
		have |= a >> 8 & 1 ? TW_FEATURE_AIBRS : 0;
	}
	cpuid(0x8000000a, &a, &b, &c, &d);
	have |= d >> 1 & 1 ? TW_FEATURE_LBRV : 0;
	have |= d >> 3 & 1 ? TW_FEATURE_NRIPS : 0;
	have |= d >> 6 & 1 ? TW_FEATURE_FLUSHBYASID : 0;
	have |= d >> 13 & 1 ? TW_FEATURE_AVIC : 0;
	have |= d >> 17 & 1 ? TW_FEATURE_GMET : 0;
	have |= d >> 18 & 1 ? TW_FEATURE_X2AVIC : 0;
	have |= d >> 19 & 1 ? TW_FEATURE_SSS : 0;
	have |= d >> 25 & 1 ? TW_FEATURE_VNMI : 0;
	have |= c >> 6 & 1 ? TW_FEATURE_X2AVIC_EXT : 0;
	return have;
}

void l1_main(void)
{
	uint32_t a, b, c, d;

	make_other_tables();
	read_dear(&own);
	wrmsr(MSR_VM_HSAVE_PA, (uint64_t)tw_host_save);
	cpuid(0x80000008, &a, &b, &c, &d);
	shared->maxphyaddr = a & 0xff;
	cpuid(0x8000000a, &a, &b, &c, &d);
	shared->svm_revision = a;
	shared->asids = b;
	shared->svm_features = d;
	shared->features = features();
	shared->protocol = TW_PROTOCOL;
	__asm__ volatile("clgi" : : : "memory");	/* nothing interrupts L1: it has no devices */
	shared->magic = TW_MAGIC;
	interpret();
}
