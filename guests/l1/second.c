/*
 * L1's second processor: it writes entries while L2 runs on the first one, when L2 asks for it in its mailbox. It is woken
 * for a run that needs it, and stands still again after it, so that it takes nothing from the first one.
 */
#include "second.h"

enum {
	ICR_LOW = 0x300, ICR_HIGH = 0x310,
	INIT = 0x4500, STARTUP = 0x4600, NMI = 0x4400,
	MSR_APIC_BASE = 0x1b,
	MAX_WRITES = 8,
};

extern uint8_t second_begin[], second_end[], SECOND_PAGE[];
extern volatile uint8_t l1_nmi_taken;

static struct tw_op writes[MAX_WRITES];
static uint32_t count;
static volatile uint32_t *request;
static volatile uint32_t stands;

void second_queue(const struct tw_op *op)
{
	if (count < MAX_WRITES)
		writes[count++] = *op;
}

static void interrupt_command(uint32_t to, uint32_t what)
{
	uint32_t low, high;
	uint64_t base;

	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(MSR_APIC_BASE));
	base = ((uint64_t)high << 32 | low) & -4096ull;
	*(volatile uint32_t *)(base + ICR_HIGH) = to << 24;
	*(volatile uint32_t *)(base + ICR_LOW) = what;
}

void second_start(void *mailbox)
{
	request = (volatile uint32_t *)((uint8_t *)mailbox + TW_MAILBOX_REQUEST);
	*request = TW_REQUEST_NONE;
	l1_nmi_taken = 0;
	stands = 0;
	for (uint32_t i = 0; i < (uint32_t)(second_end - second_begin); i++)
		SECOND_PAGE[i] = second_begin[i];
	interrupt_command(1, INIT);
	interrupt_command(1, STARTUP | (uint32_t)(uint64_t)SECOND_PAGE >> 12);
}

void second_stop(void)
{
	if (*request == TW_REQUEST_NONE)
		*request = TW_REQUEST_STOP;
	while (!stands)
		__asm__ volatile("pause");
	count = 0;
}

void second_main(void)
{
	uint32_t asked;

	while ((asked = *request) == TW_REQUEST_NONE)
		__asm__ volatile("pause");
	for (uint32_t i = 0; i < count && asked != TW_REQUEST_STOP; i++) {
		if (writes[i].arg == 4)
			*(volatile uint32_t *)writes[i].a = writes[i].b;
		else
			*(volatile uint64_t *)writes[i].a = writes[i].b;
	}
	__asm__ volatile("mfence" : : : "memory");
	if (asked == TW_REQUEST_WRITE)
		*request = TW_REQUEST_DONE;
	if (asked == TW_REQUEST_NMI)
		interrupt_command(0, NMI);
	stands = 1;
}
