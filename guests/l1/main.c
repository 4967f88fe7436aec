/*
 * L1, the probe hypervisor: interprets the program in the op ring, and posts a record right before
 * each VMRUN and right after each #VMEXIT. It knows nothing of page tables, of the VMCB's layout
 * (but for a few offsets) or of what should happen: that is all the checker's.
 */
#include "l1.h"
#include "second.h"

enum {
	MISC1_NMI = 1 << 1,
	EXIT_VMMCALL = 0x81,
	EXIT_INVALID = -1,
};

extern uint64_t l1_spin_rip;
void l1_spin(uint64_t vmcb, uint64_t count);

struct tw_shared tw_shared_page __attribute__((aligned(PAGE)));
struct tw_op tw_op_ring[TW_OP_SLOTS] __attribute__((aligned(PAGE)));
struct tw_record tw_record_ring[TW_RECORD_SLOTS] __attribute__((aligned(PAGE)));
struct tw_probe tw_mailbox[PAGE / sizeof(struct tw_probe)] __attribute__((aligned(PAGE)));

static uint8_t marked_vmcb[PAGE] __attribute__((aligned(PAGE)));

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
		if (probes[i].kind == TW_PROBE_WRPKRU)
			host_pkru_is_written();
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
		host_vmrun(op->a, plain);

		l1_host_after.early = pending_early();
		pending_settle(*exit_code, !(*(uint32_t *)(op->a + VMCB_MISC1) & MISC1_NMI));
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
		memory_find_changes(record);
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

static void sync(uint64_t number)
{
	host_at_end(next_record(TW_RECORD_SYNC, number));
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
			memory_reset();
			host_is_due();
			fill64((void *)op->a, 0, op->b);
			break;
		case TW_OP_WATCH:
			memory_watch(op->a);
			break;
		case TW_OP_WRITE:
			memory_write(op->a, op->b, op->arg);
			break;
		case TW_OP_HOST:
			host_set(op->arg, op->b);
			break;
		case TW_OP_MARK:
			memory_mark();
			copy64(marked_vmcb, (void *)op->a, PAGE);
			break;
		case TW_OP_REWIND:
			memory_rewind();
			host_is_due();
			copy64((void *)op->a, marked_vmcb, PAGE);
			break;
		case TW_OP_REMOTE:
			second_queue(op);
			break;
		case TW_OP_INVLPGA:
			__asm__ volatile("invlpga" : : "a"(op->a), "c"(op->arg) : "memory");
			break;
		case TW_OP_HOST_MODE:
			host_mode_set(op->arg);
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

void l1_main(void)
{
	uint32_t a, b, c, d;

	host_begin();
	pending_begin();
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
