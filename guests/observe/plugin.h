/*
 * What we use of QEMU's interface for TCG plugins, API versions 1 (QEMU 6.0) to 7 (11.1). Weak are functions that not
 * every version has: they are NULL there.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WEAK __attribute__((weak))

struct qemu_info {
	const char *target;
	struct {
		int min, current;
	} version;
	bool system;
	int vcpus, max_vcpus;
};

enum { NO_REGS, R_REGS };
enum { MEMORY_RW = 3 };

struct block;
struct insn;
struct hwaddr;
struct reg;

/* glib's, as its own header has them */
struct bytes {
	unsigned char *data;
	unsigned len;
};
struct array {
	char *data;
	unsigned len;
};
struct descriptor {
	struct reg *handle;
	const char *name, *feature;
	/* and more, from version 6 on */
};

#if API >= 7
typedef void translated(struct block *block, void *data);
#else
typedef void translated(uint64_t id, struct block *block);
#endif
typedef void executed(unsigned vcpu, void *data);
typedef void accessed(unsigned vcpu, uint32_t info, uint64_t gva, void *data);

void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, translated *call, void *data); /* data from version 7 on */
void qemu_plugin_register_vcpu_tb_exec_cb(struct block *block, executed *call, int flags, void *data);
void qemu_plugin_register_vcpu_insn_exec_cb(struct insn *insn, executed *call, int flags, void *data);
void qemu_plugin_register_vcpu_mem_cb(struct insn *insn, accessed *call, int flags, int kinds, void *data);
uint64_t qemu_plugin_tb_vaddr(const struct block *block);
size_t qemu_plugin_tb_n_insns(const struct block *block);
struct insn *qemu_plugin_tb_get_insn(const struct block *block, size_t index);
uint64_t qemu_plugin_insn_vaddr(const struct insn *insn);
size_t qemu_plugin_insn_size(const struct insn *insn);
bool qemu_plugin_mem_is_store(uint32_t info);
struct hwaddr *qemu_plugin_get_hwaddr(uint32_t info, uint64_t gva);
bool qemu_plugin_hwaddr_is_io(const struct hwaddr *at);
uint64_t qemu_plugin_hwaddr_phys_addr(const struct hwaddr *at);

/* up to version 2 it returns the bytes, from 3 on it copies them */
void *qemu_plugin_insn_data();

/* from version 2 (QEMU 9.0) on */
WEAK struct array *qemu_plugin_get_registers(void);
WEAK int qemu_plugin_read_register(struct reg *handle, struct bytes *out);

/* QEMU's own: what is read instead before that. A QEMU that is built with modules exports all of itself */
WEAK void *qemu_get_cpu(int index);
WEAK int x86_cpu_gdb_read_register(void *cpu, struct bytes *out, int number);

/* The clocks of the machine: TSC, and what its timers go by */
WEAK void cpu_disable_ticks(void);
WEAK void cpu_enable_ticks(void);

unsigned g_array_get_element_size(struct array *array);
struct bytes *g_byte_array_new(void);
struct bytes *g_byte_array_set_size(struct bytes *array, unsigned length);
