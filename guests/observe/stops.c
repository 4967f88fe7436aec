/*
 * A plugin for QEMU's TCG: a vCPU stops before each VMRUN of L1, behind the first memory access that L2 then makes in RAM,
 * at the instruction behind VMRUN once L2 has left, and before each INVLPGA of L1. A stop is a record sent over a socket; the vCPU waits until a
 * byte comes back. Once the other end is closed nothing stops any more.
 *
 * TCG keeps registers in its own variables within a block. What is read here stands in memory none the less: a value
 * that a later instruction's helper reads (VMRUN's, INVLPGA's) is stored where it is made. Flags of arithmetic are not
 * (they are computed late), so RFLAGS is sent without them.
 *
 * API is the version of the interface that it is built for: 1, 2 or 7. Arguments: fd=N, the socket; below=1 where L1 is itself a guest, so that VMRUNs that run it come first.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "plugin.h"
#include "wire.h"

enum { VCPUS = 64, SITES = 1024, STACK = 14 /* a kernel's is 16 KiB, so aligned */, ARITHMETIC = 0xCD5 /* CF PF AF ZF SF DF OF */ };

__attribute__((visibility("default"))) int qemu_plugin_version = API;

/* A vCPU between a VMRUN and its #VMEXIT: where it comes back, and its registers that it then has again. Below L1, of L0:
   `stack` is that of the thread that has L1's vCPU; `leaves`: the processor has begun with #VMEXIT. */
struct inside {
	uint64_t at, behind, rax, cr3, stack;
	bool on, leaves;
	unsigned switches;
};

static const struct {
	const char *name;
	uint16_t number; /* gdb's */
	uint16_t at;
} wanted[] = {
	{ "rax", 0, offsetof(struct tw_stop, rax) },	   { "rcx", 2, offsetof(struct tw_stop, rcx) },
	{ "rsp", 7, offsetof(struct tw_stop, rsp) },	   { "eflags", 17, offsetof(struct tw_stop, eflags) },
	{ "cs", 18, offsetof(struct tw_stop, cs) },	   { "ss", 19, offsetof(struct tw_stop, ss) },
	{ "ds", 20, offsetof(struct tw_stop, ds) },	   { "es", 21, offsetof(struct tw_stop, es) },
	{ "cr0", 27, offsetof(struct tw_stop, cr0) },	   { "cr3", 29, offsetof(struct tw_stop, cr3) },
	{ "cr4", 30, offsetof(struct tw_stop, cr4) },	   { "efer", 32, offsetof(struct tw_stop, efer) },
};
enum { WANTED = sizeof(wanted) / sizeof(*wanted) };

static int channel = -1;
static bool below, copies, several;
static unsigned running, switches; /* the vCPU of L1's that runs (one thread has all), and how often it was another one */
static struct inside under[VCPUS], observed[VCPUS];
static bool armed[VCPUS]; /* those of L1's whose L2 has made no access yet */
static unsigned all_armed;
static uint64_t threads[VCPUS];
static struct site {
	uint64_t vmrun, behind;
} sites[SITES];
static unsigned known;
static struct reg *handles[WANTED];
static struct bytes *buffer;

static uint64_t read_register(unsigned vcpu, unsigned which)
{
	uint64_t value = 0;

	g_byte_array_set_size(buffer, 0);
	if (qemu_plugin_read_register)
		qemu_plugin_read_register(handles[which], buffer);
	else
		x86_cpu_gdb_read_register(qemu_get_cpu(vcpu), buffer, wanted[which].number);
	memcpy(&value, buffer->data, buffer->len < sizeof(value) ? buffer->len : sizeof(value));
	return value;
}

static bool find_registers(void)
{
	struct array *all = qemu_plugin_get_registers();
	size_t size = g_array_get_element_size(all);

	for (unsigned index = 0; index < all->len; index++) {
		const struct descriptor *one = (const void *)(all->data + index * size);

		for (unsigned which = 0; which < WANTED; which++)
			if (!strcmp(one->name, wanted[which].name))
				handles[which] = one->handle;
	}
	for (unsigned which = 0; which < WANTED; which++)
		if (!handles[which])
			return false;
	return true;
}

/* The other end sees that it is closed. */
static void give_up(void)
{
	close(channel);
	channel = -1;
}

static struct tw_stop look(unsigned kind, unsigned vcpu, uint64_t pc)
{
	struct tw_stop stop = { .kind = kind, .vcpu = vcpu, .pc = pc };

	if (qemu_plugin_read_register && !handles[0] && !find_registers()) {
		give_up();
		return stop;
	}
	for (unsigned which = 0; which < WANTED; which++) {
		uint64_t value = read_register(vcpu, which);

		memcpy((char *)&stop + wanted[which].at, &value, sizeof(value));
	}
	stop.eflags &= ~(uint64_t)ARITHMETIC;
	return stop;
}

static unsigned ask(const struct tw_stop *stop)
{
	unsigned char answer = 0;
	ssize_t done = 0;

	if (channel < 0)
		return 0;
	do
		done = write(channel, stop, sizeof(*stop));
	while (done < 0 && errno == EINTR);
	if (done == sizeof(*stop)) {
		do
			done = read(channel, &answer, 1);
		while (done < 0 && errno == EINTR);
		if (done == 1)
			return answer;
	}
	channel = -1;
	return 0;
}

/* Tell it, and wait for the answer: TW_ANSWER_...; 0 once nobody listens. The machine's clocks stand still meanwhile, or its
   guests would have nothing to do but their timers. */
static unsigned tell(const struct tw_stop *stop)
{
	bool still = cpu_disable_ticks && cpu_enable_ticks;
	unsigned answer;

	if (still)
		cpu_disable_ticks();
	answer = ask(stop);
	if (still)
		cpu_enable_ticks();
	return answer;
}

/* The number of the vCPU of L1's that runs: the processor's or, where L0 is a kernel that L1 runs under, that of the thread
   of L0's which has it. Not to be asked while L0 itself runs. VCPUS where there are too many. */
static unsigned of_l1(unsigned vcpu)
{
	uint64_t thread = under[vcpu].stack >> STACK;

	if (!below)
		return vcpu;
	for (unsigned one = 0; one < VCPUS; one++) {
		if (!threads[one])
			threads[one] = thread;
		if (threads[one] == thread)
			return one;
	}
	give_up();
	return VCPUS;
}

static void runs(unsigned number)
{
	switches += number != running;
	running = number;
}

static void arm(unsigned number, bool on)
{
	all_armed += on - armed[number];
	armed[number] = on;
}

static bool is_back(const struct inside *one, uint64_t pc, const struct tw_stop *now)
{
	return one->on && one->behind == pc && one->rax == now->rax && one->cr3 == now->cr3;
}

static void at_vmrun(unsigned vcpu, void *data)
{
	const struct site *site = data;
	uint64_t behind = site->behind;
	struct inside *one;
	struct tw_stop stop;
	unsigned answer;

	if (channel < 0)
		return;
	stop = look(TW_STOP_ENTER, vcpu, site->vmrun);
	if (below && !under[vcpu].on) {
		under[vcpu] = (struct inside){ site->vmrun, behind, stop.rax, stop.cr3, stop.rsp, .on = true };
		runs(of_l1(vcpu));
		return;
	}
	stop.vcpu = of_l1(vcpu);
	if (stop.vcpu == VCPUS)
		return;
	one = &observed[stop.vcpu];
	/* L2's own; or L1's once more, which raised an exception */
	if (one->on && !is_back(one, behind, &stop))
		return;
	answer = tell(&stop);
	*one = (struct inside){ site->vmrun, behind, stop.rax, stop.cr3, .on = answer == TW_ANSWER_ENTERED,
				.switches = switches };
	arm(stop.vcpu, one->on);
}

static void at_site(unsigned vcpu, void *data)
{
	uint64_t pc = (uint64_t)data;
	unsigned number;
	struct inside *one;
	struct tw_stop stop;

	if (channel < 0 || (below && !under[vcpu].on))
		return;
	number = of_l1(vcpu);
	if (number == VCPUS)
		return;
	one = &observed[number];
	if ((!one->on || one->behind != pc) && (!below || under[vcpu].behind != pc))
		return;
	stop = look(TW_STOP_EXIT, vcpu, pc);
	stop.vcpu = number;
	if (below && is_back(&under[vcpu], pc, &stop)) {
		under[vcpu].on = false;
	} else if (is_back(one, pc, &stop)) {
		one->on = false;
		arm(number, false);
		tell(&stop);
	}
}

static void at_invlpga(unsigned vcpu, void *data)
{
	struct tw_stop stop;
	unsigned number;

	if (channel < 0 || (below && !under[vcpu].on))
		return;
	number = of_l1(vcpu);
	if (number == VCPUS || observed[number].on)
		return;
	stop = look(TW_STOP_INVLPGA, vcpu, (uint64_t)data);
	stop.vcpu = number;
	stop.gva = stop.rax;
	tell(&stop);
}

static void at_access(unsigned vcpu, uint32_t info, uint64_t gva, void *data)
{
	struct inside *l2;
	struct hwaddr *at;
	struct tw_stop stop;
	unsigned number;
	uint64_t spa;

	if (!all_armed || channel < 0 || (below && !under[vcpu].on))
		return;
	number = of_l1(vcpu);
	if (number == VCPUS || !armed[number])
		return;
	l2 = below ? &under[vcpu] : &observed[number];
	/* VMRUN's own accesses, where its block was translated while another vCPU was inside, are not L2's */
	if (l2->leaves || l2->at == (uint64_t)data)
		return;
	at = qemu_plugin_get_hwaddr(info, gva);
	if (!at || qemu_plugin_hwaddr_is_io(at))
		return;
	spa = qemu_plugin_hwaddr_phys_addr(at);
	l2->leaves = (spa ^ l2->rax) >> 12 == 0; /* the VMCB: that is #VMEXIT itself, in its instruction's name */
	if (l2->leaves)
		return;
	arm(number, false);
	stop = look(TW_STOP_ACCESS, vcpu, (uint64_t)data);
	stop.vcpu = number;
	stop.gva = gva;
	stop.spa = spa;
	stop.write = qemu_plugin_mem_is_store(info);
	stop.others = switches != observed[number].switches;
	tell(&stop);
}

static void at_block(unsigned vcpu, void *data)
{
	(void)data;
	runs(vcpu);
}

/* Whether the instruction is 0F 01 and that byte, behind prefixes at most. */
static bool is(const unsigned char *bytes, size_t size, unsigned char last)
{
	if (size < 3 || bytes[size - 3] != 0x0F || bytes[size - 2] != 0x01 || bytes[size - 1] != last)
		return false;
	for (size_t at = 0; at < size - 3; at++)
		if (!strchr("\x26\x2E\x36\x3E\x64\x65\x66\x67\xF2\xF3", bytes[at]) && bytes[at] >> 4 != 4)
			return false;
	return true;
}

/* Whether that processor of L0's is with a vCPU of L1's that is behind its VMRUN. */
static bool runs_l2(unsigned vcpu)
{
	unsigned number = of_l1(vcpu);

	return number < VCPUS && observed[number].on;
}

static struct site *site_before(uint64_t pc)
{
	for (unsigned one = 0; one < known; one++)
		if (sites[one].behind == pc)
			return &sites[one];
	return NULL;
}

static struct site *site_at(uint64_t pc, uint64_t behind)
{
	struct site *one = site_before(behind);

	if (one || known == SITES)
		return one;
	sites[known] = (struct site){ pc, behind };
	return &sites[known++];
}

static void translate(struct block *block)
{
	size_t count = qemu_plugin_tb_n_insns(block);
	bool of_l2 = false;

	if (channel < 0)
		return;
	if (several)
		qemu_plugin_register_vcpu_tb_exec_cb(block, at_block, NO_REGS, NULL);
	/* #VMEXIT is noticed once the block behind VMRUN is executed, after it was translated */
	for (unsigned vcpu = 0; vcpu < VCPUS && !site_before(qemu_plugin_tb_vaddr(block)); vcpu++)
		of_l2 |= below ? under[vcpu].on && runs_l2(vcpu) : observed[vcpu].on;
	for (size_t index = 0; index < count; index++) {
		struct insn *insn = qemu_plugin_tb_get_insn(block, index);
		uint64_t pc = qemu_plugin_insn_vaddr(insn);
		size_t size = qemu_plugin_insn_size(insn);
		unsigned char bytes[16] = { 0 };

		if (index == 0 && site_before(pc)) /* #VMEXIT begins a block */
			qemu_plugin_register_vcpu_insn_exec_cb(insn, at_site, R_REGS, (void *)pc);
		if (of_l2)
			qemu_plugin_register_vcpu_mem_cb(insn, at_access, R_REGS, MEMORY_RW, (void *)pc);
		if (size < 3 || size > sizeof(bytes))
			continue;
		if (copies)
			qemu_plugin_insn_data(insn, bytes, size);
		else
			memcpy(bytes, qemu_plugin_insn_data(insn), size);
		if (is(bytes, size, 0xD8)) {
			struct site *site = site_at(pc, pc + size);

			if (!site)
				return give_up();
			qemu_plugin_register_vcpu_insn_exec_cb(insn, at_vmrun, R_REGS, site);
		} else if (is(bytes, size, 0xDF)) {
			qemu_plugin_register_vcpu_insn_exec_cb(insn, at_invlpga, R_REGS, (void *)pc);
		}
	}
}

#if API >= 7
static void at_translation(struct block *block, void *data)
{
	(void)data;
	translate(block);
}
#else
static void at_translation(uint64_t id, struct block *block)
{
	(void)id;
	translate(block);
}
#endif

__attribute__((visibility("default"))) int qemu_plugin_install(uint64_t id, const struct qemu_info *info, int argc,
							       char **argv)
{
	for (int index = 0; index < argc; index++) {
		if (!strncmp(argv[index], "fd=", 3))
			channel = atoi(argv[index] + 3);
		else if (!strcmp(argv[index], "below=1"))
			below = true;
	}
	if (!qemu_plugin_read_register && !(qemu_get_cpu && x86_cpu_gdb_read_register))
		return 1;
	copies = info->version.current >= 3;
	several = info->vcpus > 1;
	buffer = g_byte_array_new();
	qemu_plugin_register_vcpu_tb_trans_cb(id, at_translation, NULL);
	return 0;
}
