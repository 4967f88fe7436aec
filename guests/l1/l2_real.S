/* L2's code for real mode: 16-bit code with 32-bit operands and addresses. */
#define REAL
#define PREFIX l2_real_
#define L2(name) l2_real_ ## name
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
	.code16
#include "l2.inc"
