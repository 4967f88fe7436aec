/*
 * Copies a trace ring to a port: follow TRACE_PIPE_RAW PORT. It takes all that there is, then sleeps: a reader that
 * is woken by each event costs more than all that it reads. Status 1: a file that cannot be opened, or written.
 */
#include "call.h"

enum { O_WRONLY = 1, O_NONBLOCK = 04000, PAGE = 4096, PAGES = 32, EAGAIN = 11 };

static char buffer[PAGES * PAGE];

static void copy(const char *from, const char *to)
{
	static const struct { long seconds, nanoseconds; } nap = { 0, 3000000 };
	long in = call(OPEN, (ulong)from, O_NONBLOCK, 0, 0, 0, 0);
	long out = call(OPEN, (ulong)to, O_WRONLY, 0, 0, 0, 0);

	if (in < 0 || out < 0)
		end(1, "follow: cannot open\n");
	for (;;) {
		ulong length = 0;
		long got = 0;

		while (length < sizeof(buffer)) {
			got = call(READ, in, (ulong)buffer + length, PAGE, 0, 0, 0);
			if (got <= 0)
				break;
			length += got;
		}
		if (got < 0 && got != -EAGAIN)
			end(1, "follow: cannot read\n");
		for (ulong at = 0; at < length; at += got) {
			got = call(WRITE, out, (ulong)buffer + at, length - at, 0, 0, 0);
			if (got <= 0)
				end(1, "follow: cannot write\n");
		}
		if (length < sizeof(buffer))
			call(NANOSLEEP, (ulong)&nap, 0, 0, 0, 0, 0);
	}
}

__attribute__((used)) static void start(const ulong *stack)
{
	if (stack[0] != 3)
		end(1, "follow TRACE_PIPE_RAW PORT\n");
	copy((const char *)stack[2], (const char *)stack[3]);
}

__asm__(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tcall start\n");
