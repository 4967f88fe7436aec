/* What L1's parts have in common, and what each of them offers to main.c. */
#pragma once
#include "wire.h"

enum {
	VMCB_MISC1 = 0xc,
	VMCB_EXIT_CODE = 0x70,
	VMCB_NP_CONTROL = 0x90,
	VMCB_SAVE = 0x400,
	VMCB_CPL = 0x4cb,
	VMCB_EFER = 0x4d0,
	VMCB_CR4 = 0x548,
	VMCB_RFLAGS = 0x570,
	VMCB_RIP = 0x578,
	VMCB_RSP = 0x5d8,
	VMCB_G_PAT = 0x668,
	EXIT_NMI = 0x61,
	PAGE = 4096,
};

extern struct tw_shared tw_shared_page;
extern struct tw_regs l1_regs;
static volatile struct tw_shared *const shared = &tw_shared_page;

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

/* memory.c: what L1 writes, and what changed in the pages that it watches. */
void memory_reset(void);
void memory_mark(void);				/* a rewind goes back to here */
void memory_rewind(void);
void memory_watch(uint64_t page);
void memory_write(uint64_t address, uint64_t value, uint32_t width);
void memory_find_changes(struct tw_record *record);

/* host.c: L1's own registers, and VMRUN, which may spoil them. */
extern struct tw_host l1_host_before, l1_host_after;
void host_begin(void);
void host_mode_set(uint32_t mode);
void host_set(uint32_t reg, uint64_t value);
void host_is_due(void);				/* all is to be read behind the next VMRUN */
void host_pkru_is_written(void);		/* by L2 */
void host_vmrun(uint64_t vmcb, int plain);
void host_at_end(struct tw_record *record);

/* features.c */
uint64_t features(void);			/* of this CPU: TW_FEATURE_* */

/* pending.c: an NMI or an interrupt that L1 sends itself. */
void pending_begin(void);
void pending_set(uint32_t is_nmi, uint32_t value);	/* 1: send it; 0: take it, if it is pending */
uint32_t pending_early(void);				/* what L1 has taken that is none of its own: `early` of tw_host */
void pending_settle(uint64_t exit_code, uint32_t takes_nmi);	/* behind a #VMEXIT */
