/*
 * An NMI or an interrupt that L1 sends itself through its local APIC. While L1 runs GIF is 0, which holds it until VMRUN;
 * there it ends L2, or is L2's.
 */
#include "l1.h"

enum {
	EOI = 0xb0, SPURIOUS = 0xf0, IN_SERVICE = 0x100, ICR_LOW = 0x300, ICR_HIGH = 0x310,
	ENABLED = 0x100, NMI = 0x4400, FIXED = 0x4000,
	MSR_APIC_BASE = 0x1b,
	VECTOR_NMI = 2,
	EXIT_INTR = 0x60,
	LONG_ENOUGH = 1 << 20,
};

extern struct { uint16_t low, selector, type, middle; uint32_t high, zero; } l1_idt[];
extern volatile uint8_t l1_nmi_taken, l1_interrupt_taken;
extern volatile uint32_t l1_exception_taken;
void l1_nmi(void);
void l1_interrupt(void);

static uint32_t nmi_is_sent, interrupt_is_sent;

static volatile uint32_t *apic(uint32_t offset)
{
	return (volatile uint32_t *)((rdmsr(MSR_APIC_BASE) & -4096ull) + offset);
}

static void set_gate(int vector, void (*handler)(void))
{
	uint64_t at = (uint64_t)handler;

	l1_idt[vector].low = at;
	l1_idt[vector].middle = at >> 16;
	l1_idt[vector].high = at >> 32;
}

static void mask(uint16_t port)
{
	__asm__ volatile("outb %0, %1" : : "a"((uint8_t)0xff), "Nd"(port));
}

void pending_begin(void)
{
	mask(0x21);			/* nothing else comes: the 8259s have a timer's interrupt for L1 */
	mask(0xa1);
	set_gate(VECTOR_NMI, l1_nmi);
	set_gate(TW_INTERRUPT_VECTOR, l1_interrupt);
}

static void wait_for(volatile uint8_t *taken)
{
	for (uint32_t i = 0; !*taken && i < LONG_ENOUGH; i++)
		__asm__ volatile("pause");
}

static void take_nmi(void)
{
	__asm__ volatile("stgi" : : : "memory");
	wait_for(&l1_nmi_taken);
	__asm__ volatile("clgi" : : : "memory");
	nmi_is_sent = 0;
}

static void take_interrupt(void)
{
	__asm__ volatile("stgi; sti" : : : "memory");
	wait_for(&l1_interrupt_taken);
	__asm__ volatile("cli; clgi" : : : "memory");
	*apic(EOI) = 0;
	interrupt_is_sent = 0;
}

/* L2 took the NMI: the next one is held back until an IRET. If L2 did not take it, L1 does now. */
static void let_nmi_in(void)
{
	uint64_t at, segments;

	__asm__ volatile(
		"mov %%rsp, %0; mov %%ss, %k1; push %1; push %0; pushf; mov %%cs, %k1; push %1\n\t"
		"lea 1f(%%rip), %1; push %1; iretq\n"
		"1:	stgi; nop; nop; clgi" : "=&r"(at), "=&r"(segments) : : "memory", "cc");
	nmi_is_sent = 0;
}

uint32_t pending_early(void)
{
	uint32_t exception = l1_exception_taken;

	l1_exception_taken = 0;
	return (nmi_is_sent && l1_nmi_taken ? 1 : 0) | (interrupt_is_sent && l1_interrupt_taken ? 2 : 0)
		| (exception ? 4 | (exception - 1) << 8 : 0);
}

/*
 * Behind a #VMEXIT: L1 takes what ended L2; of an interrupt that L2 took it tells the APIC the end. `takes_nmi`: L1 does
 * not intercept NMIs.
 */
void pending_settle(uint64_t exit_code, uint32_t takes_nmi)
{
	if (exit_code == EXIT_NMI)
		take_nmi();
	else if (nmi_is_sent && takes_nmi)
		let_nmi_in();
	if (!interrupt_is_sent)
		return;
	if (exit_code == EXIT_INTR) {
		take_interrupt();
	} else if (*apic(IN_SERVICE + TW_INTERRUPT_VECTOR / 32 * 16) >> TW_INTERRUPT_VECTOR % 32 & 1) {
		*apic(EOI) = 0;
		interrupt_is_sent = 0;
	}
}

void pending_set(uint32_t is_nmi, uint32_t value)
{
	if (!value) {
		if (is_nmi && nmi_is_sent)
			take_nmi();
		if (!is_nmi && interrupt_is_sent)
			take_interrupt();
		return;
	}
	if (!(*apic(SPURIOUS) & ENABLED))
		*apic(SPURIOUS) = 0xff | ENABLED;
	*apic(ICR_HIGH) = 0;
	if (is_nmi) {
		l1_nmi_taken = 0;
		nmi_is_sent = 1;
		*apic(ICR_LOW) = NMI;
	} else {
		l1_interrupt_taken = 0;
		interrupt_is_sent = 1;
		*apic(ICR_LOW) = FIXED | TW_INTERRUPT_VECTOR;
	}
}
