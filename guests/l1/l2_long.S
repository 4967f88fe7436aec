/* L2's code for 64-bit mode. */
#define LONG
#define PREFIX l2_long_
#define L2(name) l2_long_ ## name
#define rAX %rax
#define rBX %rbx
#define rCX %rcx
#define rDX %rdx
#define rSI %rsi
#define rDI %rdi
#define rBP %rbp
#define rSP %rsp
#define WIDTH 8
#define PUSH pushq
#define POP popq
#define PUSHF pushfq
#define POPF popfq
#define LIMIT movzwq
#include "l2.inc"
