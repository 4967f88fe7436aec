/* L2's code for 32-bit protected mode, with paging or without. */
#define PREFIX l2_prot_
#define L2(name) l2_prot_ ## name
#define rAX %eax
#define rBX %ebx
#define rCX %ecx
#define rDX %edx
#define rSI %esi
#define rDI %edi
#define rBP %ebp
#define rSP %esp
#define WIDTH 4
#define PUSH pushl
#define POP popl
#define PUSHF pushfl
#define POPF popfl
#define LIMIT movzwl
	.code32
#include "l2.inc"
