/*
 * Work for an MMU: maps memory, writes to it, takes rights away and gives them back, forks and writes on both sides,
 * moves mappings and unmaps them; and the same with large pages, of which parts are protected and given back. Every page
 * is checked: status 1 and where, if one has not what was written there.
 */
#include "call.h"

enum {
	MPROTECT = 10, MUNMAP = 11, MREMAP = 25, MADVISE = 28, FORK = 57, WAIT4 = 61, PAGE = 4096, PAGES = 1024,
	LARGE = 2 << 20, DONTNEED = 4, HUGEPAGE = 14
};

static ulong *at(ulong base, ulong page)
{
	return (ulong *)(base + page * PAGE);
}

static void fill(ulong base, ulong tag)
{
	for (ulong page = 0; page < PAGES; page++)
		*at(base, page) = tag + page;
}

static void check(ulong base, ulong tag, const char *what)
{
	for (ulong page = 0; page < PAGES; page++)
		if (*at(base, page) != tag + page)
			end(1, what);
}

static ulong map(ulong pages)
{
	long base = call(MMAP, 0, pages * PAGE, 3, 0x22 /* MAP_PRIVATE | MAP_ANONYMOUS */, -1, 0);

	if (base < 0 && base > -4096)
		end(1, "no memory\n");
	return base;
}

static void small(ulong tag)
{
	ulong base = map(PAGES), other;
	long child;
	int status = 1;

	fill(base, tag);
	call(MPROTECT, base, PAGES * PAGE, 1, 0, 0, 0);
	check(base, tag, "memory: wrong behind mprotect\n");
	call(MPROTECT, base, PAGES * PAGE, 3, 0, 0, 0);
	child = call(FORK, 0, 0, 0, 0, 0, 0);
	if (!child) {
		check(base, tag, "memory: wrong in the child\n");
		fill(base, ~tag);
		check(base, ~tag, "memory: wrong behind the child's writes\n");
		call(EXIT, 0, 0, 0, 0, 0, 0);
	}
	call(WAIT4, child, (ulong)&status, 0, 0, 0, 0);
	if (child < 0 || status)
		end(1, "memory: the child failed\n");
	check(base, tag, "memory: wrong behind the child\n");
	call(MADVISE, base, PAGES * PAGE / 2, DONTNEED, 0, 0, 0);
	if (*at(base, 0))
		end(1, "memory: not zero behind MADV_DONTNEED\n");
	fill(base, tag + 1);
	other = call(MREMAP, base, PAGES * PAGE, 2 * PAGES * PAGE, 1 /* MREMAP_MAYMOVE */, 0, 0);
	check(other, tag + 1, "memory: wrong behind mremap\n");
	call(MUNMAP, other, 2 * PAGES * PAGE, 0, 0, 0, 0);
}

/* Two large pages; a small one in each is written to by a child, protected, and given back, so that they are split. */
static void large(ulong tag)
{
	ulong whole = map(2 * PAGES), base = (whole + LARGE - 1) & -(ulong)LARGE;
	long child;
	int status = 1;

	call(MADVISE, base, PAGES * PAGE, HUGEPAGE, 0, 0, 0);
	fill(base, tag);
	child = call(FORK, 0, 0, 0, 0, 0, 0);
	if (!child) {
		*at(base, 7) = tag;
		*at(base, 7) = tag + 7;
		check(base, tag, "memory: wrong in the child's large pages\n");
		call(EXIT, 0, 0, 0, 0, 0, 0);
	}
	call(WAIT4, child, (ulong)&status, 0, 0, 0, 0);
	if (child < 0 || status)
		end(1, "memory: the child of large pages failed\n");
	call(MPROTECT, base + 3 * PAGE, PAGE, 1, 0, 0, 0);
	check(base, tag, "memory: wrong behind mprotect in a large page\n");
	call(MADVISE, base + LARGE + 5 * PAGE, PAGE, DONTNEED, 0, 0, 0);
	if (*at(base, LARGE / PAGE + 5) || *at(base, LARGE / PAGE + 6) != tag + LARGE / PAGE + 6)
		end(1, "memory: wrong behind MADV_DONTNEED in a large page\n");
	call(MUNMAP, whole, 2 * PAGES * PAGE, 0, 0, 0, 0);
}

__attribute__((used)) static void run(void)
{
	for (ulong round = 1; round <= 3; round++) {
		small(round << 32);
		large(round << 40);
	}
	end(0, "L2: memory is right\n");
}

__asm__(".globl _start\n_start:\n\tand $-16, %rsp\n\tcall run\n");
