/*
 * Makes pages of a file present and says where they are: pages FILE SIZE START LENGTH ...
 * The file is made SIZE bytes long; each range is mapped, written to, and locked. For each 4K page of the ranges,
 * in their order, the page's quadword of /proc/self/pagemap goes to standard output. Status 1: no memory.
 */
#include "call.h"

static ulong number(const char *text)
{
	ulong value = 0;

	for (; *text; text++)
		value = value * 10 + (*text - '0');
	return value;
}

__attribute__((used)) static void run(ulong *stack)
{
	static ulong entries[512];
	char **argv = (char **)(stack + 1);
	long file, map;
	int argc = stack[0];

	if (argc < 3)
		end(2, "pages FILE SIZE START LENGTH ...\n");
	file = call(OPEN, (ulong)argv[1], 0102 /* O_RDWR | O_CREAT */, 0600, 0, 0, 0);
	map = call(OPEN, (ulong) "/proc/self/pagemap", 0, 0, 0, 0, 0);
	if (file < 0 || map < 0 || call(FTRUNCATE, file, number(argv[2]), 0, 0, 0, 0) < 0)
		end(2, "cannot make the file, or read pagemap\n");
	for (int i = 3; i + 1 < argc; i += 2) {
		ulong length = number(argv[i + 1]);
		long at = call(MMAP, 0, length, 3, 1 /* MAP_SHARED */, file, number(argv[i]));

		if (at < 0 && at > -4096)
			end(1, "no memory for the pages\n");
		if (call(MLOCK, at, length, 0, 0, 0, 0) < 0)
			end(1, "no memory to lock the pages\n");
		for (ulong page = 0; page < length; page += 4096)
			*(volatile char *)(at + page) = 0;
		for (ulong page = 0; page < length; page += sizeof(entries) * 512) {
			ulong bytes = (length - page) / 512;

			bytes = bytes < sizeof(entries) ? bytes : sizeof(entries);
			if (call(PREAD, map, (ulong)entries, bytes, (at + page) / 512, 0, 0) != (long)bytes ||
			    call(WRITE, 1, (ulong)entries, bytes, 0, 0, 0) != (long)bytes)
				end(2, "cannot read pagemap\n");
		}
	}
	call(EXIT, 0, 0, 0, 0, 0, 0);
}

__asm__(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall run\n");
