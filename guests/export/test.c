@HEAD@
#include <stdint.h>

enum {
	MSR_EFER = 0xc0000080,
	MSR_PAT = 0x277,
	MSR_VM_HSAVE_PA = 0xc0010117,
	SERIAL = 0x3f8,
	DEBUG_EXIT = 0xf4,	/* -device isa-debug-exit,iobase=0xf4 */
};

enum mode { PAE, LEGACY, OFF };	/* L1's at VMRUN, where it is not long mode */

void run_l2(uint64_t vmcb);
void run_l2_from_32(uint64_t vmcb, enum mode mode);
extern uint8_t host_save[];
extern uint64_t l2_registers[6];

static int failed;

static void outb(uint16_t port, uint8_t value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void print(const char *text)
{
	for (; *text; text++)
		outb(SERIAL, *text);
}

static void print_number(uint64_t value)
{
	char text[17];
	int at = 16;

	text[at] = 0;
	do
		text[--at] = "0123456789abcdef"[value & 15];
	while (value >>= 4);
	print("0x");
	print(text + at);
}

/* `expected` is what the AMD manual says; bits that are not in `mask` it leaves open. */
static void check(const char *what, uint64_t observed, uint64_t expected, uint64_t mask)
{
	int wrong = ((observed ^ expected) & mask) != 0;

	print(wrong ? "WRONG " : "ok    ");
	print(what);
	print(": expected ");
	print_number(expected & mask);
	print(", observed ");
	print_number(observed & mask);
	print("\n");
	failed |= wrong;
}

static uint64_t get(uint64_t address, int bytes)
{
	uint64_t value = 0;

	for (int i = 0; i < bytes; i++)
		value |= (uint64_t)((volatile uint8_t *)address)[i] << 8 * i;
	return value;
}

static void put(uint64_t address, uint64_t value, int bytes)
{
	for (int i = 0; i < bytes; i++)
		((volatile uint8_t *)address)[i] = value >> 8 * i;
}

static void copy(uint64_t to, const uint8_t *from, const uint8_t *end)
{
	while (from < end)
		put(to++, *from++, 1);
}

static inline void write_msr(uint32_t msr, uint64_t value)
{
	__asm__ volatile("wrmsr" : : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

static inline uint64_t read_msr(uint32_t msr)
{
	uint32_t low, high;
	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
	return (uint64_t)high << 32 | low;
}

#define SET(reg, value) __asm__ volatile("mov %0, %%" #reg : : "r"((uint64_t)(value)) : "memory")
#define READ(reg) ({ uint64_t value_; __asm__ volatile("mov %%" #reg ", %0" : "=r"(value_)); value_; })

static inline void set_pkru(uint32_t value)
{
	SET(cr4, READ(cr4) | 1 << 22);
	__asm__ volatile("wrpkru" : : "a"(value), "c"(0), "d"(0));
	SET(cr4, READ(cr4) & ~(1ull << 22));
}

static inline void invlpga(uint64_t address, uint32_t asid)
{
	__asm__ volatile("invlpga" : : "a"(address), "c"(asid) : "memory");
}

@CASE@
int main(void)
{
	write_msr(MSR_VM_HSAVE_PA, (uint64_t)host_save);
	__asm__ volatile("clgi" : : : "memory");
	set_up();
	test();
	print(failed ? "FAIL\n" : "PASS\n");
	outb(DEBUG_EXIT, failed);	/* QEMU exits with 1 if it passed, 3 if it failed */
	return 0;
}
