/*
 * l1_vmrun(vmcb, vmload): one VMRUN, behind VMLOAD from there if that is not 0. L1's state is read right before it and right
 * after the #VMEXIT, before L1 relies on any of it: a machine that restores a wrong value is caught by the
 * checker, and L1 lives on, because everything it needs is put back here, and by the caller. What a hypervisor
 * under L1 makes dear, some registers and VMSAVE, is the caller's (main.c: vmrun_long).
 * Its RSP, GDTR and IDTR are at TW_L1_HIGH then, where it has its memory once more: a machine that cuts them short shows.
 */
#include "wire.h"

	/* Read L1's own state into \to; clobbers rax and rdx. RAX, RSP and RFLAGS are the caller's. */
	.macro READ_HOST to
	mov %cr0, %rax
	mov %rax, \to + TW_AT_HOST_CR0(%rip)
	mov %cr3, %rax
	mov %rax, \to + TW_AT_HOST_CR3(%rip)
	mov %cr8, %rax
	mov %rax, \to + TW_AT_HOST_CR8(%rip)
	rdtsc
	mov %eax, \to + TW_AT_HOST_TSC(%rip)
	mov %edx, \to + TW_AT_HOST_TSC + 4(%rip)
	movw %es, \to + TW_AT_HOST_ES(%rip)
	movw %cs, \to + TW_AT_HOST_CS(%rip)
	movw %ss, \to + TW_AT_HOST_SS(%rip)
	movw %ds, \to + TW_AT_HOST_DS(%rip)
	sgdt pointer(%rip)
	mov pointer(%rip), %ax
	mov %ax, \to + TW_AT_HOST_GDT_LIMIT(%rip)
	mov pointer + 2(%rip), %rax
	mov %rax, \to + TW_AT_HOST_GDT_BASE(%rip)
	sidt pointer(%rip)
	mov pointer(%rip), %ax
	mov %ax, \to + TW_AT_HOST_IDT_LIMIT(%rip)
	mov pointer + 2(%rip), %rax
	mov %rax, \to + TW_AT_HOST_IDT_BASE(%rip)
	.endm

	.text
	.globl l1_vmrun
l1_vmrun:
	push %rbx
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
	mov %rdi, vmcb_address(%rip)
	mov %rsi, vmload_address(%rip)
	lgdt l1_high_gdt_pointer(%rip)
	lidt l1_high_idt_pointer(%rip)
	mov %rsp, low_stack(%rip)
	mov $TW_L1_HIGH, %rax
	add %rax, %rsp
	READ_HOST l1_host_before
	mov vmcb_address(%rip), %rax
	mov %rax, l1_host_before + TW_AT_HOST_RAX(%rip)
	mov %rsp, l1_host_before + TW_AT_HOST_RSP(%rip)
	mov l1_vmrun_rflags(%rip), %rax
	mov %rax, l1_host_before + TW_AT_HOST_RFLAGS(%rip)
	mov vmload_address(%rip), %rax
	test %rax, %rax
	je 1f
	vmload %rax
1:	mov vmcb_address(%rip), %rax
	cmpl $0, l1_vmrun_gif(%rip)
	je 1f
	stgi
1:	pushq l1_vmrun_rflags(%rip)
	popf

	mov l1_regs + TW_AT_REGS_RBX(%rip), %rbx
	mov l1_regs + TW_AT_REGS_RCX(%rip), %rcx
	mov l1_regs + TW_AT_REGS_RDX(%rip), %rdx
	mov l1_regs + TW_AT_REGS_RSI(%rip), %rsi
	mov l1_regs + TW_AT_REGS_RDI(%rip), %rdi
	mov l1_regs + TW_AT_REGS_RBP(%rip), %rbp
	mov l1_regs + TW_AT_REGS_R8(%rip), %r8
	mov l1_regs + TW_AT_REGS_R9(%rip), %r9
	mov l1_regs + TW_AT_REGS_R10(%rip), %r10
	mov l1_regs + TW_AT_REGS_R11(%rip), %r11
	mov l1_regs + TW_AT_REGS_R12(%rip), %r12
	mov l1_regs + TW_AT_REGS_R13(%rip), %r13
	mov l1_regs + TW_AT_REGS_R14(%rip), %r14
	mov l1_regs + TW_AT_REGS_R15(%rip), %r15
	.globl l1_vmrun_instruction
l1_vmrun_instruction:
	vmrun %rax
	.globl l1_vmrun_behind
l1_vmrun_behind:
	mov %rax, l1_host_after + TW_AT_HOST_RAX(%rip)
	mov %rsp, l1_host_after + TW_AT_HOST_RSP(%rip)
	mov low_stack(%rip), %rsp
	pushf
	popq l1_host_after + TW_AT_HOST_RFLAGS(%rip)
	push $2				/* none of what it had: DF, IF, NT */
	popf
	mov %rbx, l1_regs + TW_AT_REGS_RBX(%rip)
	mov %rcx, l1_regs + TW_AT_REGS_RCX(%rip)
	mov %rdx, l1_regs + TW_AT_REGS_RDX(%rip)
	mov %rsi, l1_regs + TW_AT_REGS_RSI(%rip)
	mov %rdi, l1_regs + TW_AT_REGS_RDI(%rip)
	mov %rbp, l1_regs + TW_AT_REGS_RBP(%rip)
	mov %r8, l1_regs + TW_AT_REGS_R8(%rip)
	mov %r9, l1_regs + TW_AT_REGS_R9(%rip)
	mov %r10, l1_regs + TW_AT_REGS_R10(%rip)
	mov %r11, l1_regs + TW_AT_REGS_R11(%rip)
	mov %r12, l1_regs + TW_AT_REGS_R12(%rip)
	mov %r13, l1_regs + TW_AT_REGS_R13(%rip)
	mov %r14, l1_regs + TW_AT_REGS_R14(%rip)
	mov %r15, l1_regs + TW_AT_REGS_R15(%rip)
	READ_HOST l1_host_after

	lgdt l1_gdt_pointer(%rip)
	lidt l1_idt_pointer(%rip)
	push $L1_CS
	lea 1f(%rip), %rax
	push %rax
	lretq
1:	mov $L1_DS, %eax
	mov %eax, %ds
	mov %eax, %ss
	mov $L1_ES, %eax
	mov %eax, %es
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbp
	pop %rbx
	ret

/*
 * l1_spin(vmcb, count): VMRUNs with nothing around them, for the rate that the machine can do.
 */
	.globl l1_spin
l1_spin:
	push %rbx
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
	push %rsi
	mov %rdi, vmcb_address(%rip)
	mov %rsp, l1_host_before + TW_AT_HOST_RSP(%rip)
1:	mov l1_regs + TW_AT_REGS_RSI(%rip), %rsi
	xor %ebp, %ebp
	mov vmcb_address(%rip), %rax
	mov l1_spin_rip(%rip), %rbx
	mov %rbx, 0x578(%rax)
	vmrun %rax
	decq (%rsp)
	jnz 1b
	pop %rsi
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbp
	pop %rbx
	ret

	.section .bss
	.balign 16
	.globl l1_regs, l1_host_before, l1_host_after, l1_spin_rip
l1_regs:	.skip TW_SIZEOF_REGS
		.balign 16
l1_host_before:	.skip TW_SIZEOF_HOST
		.balign 16
l1_host_after:	.skip TW_SIZEOF_HOST
vmcb_address:	.skip 8
vmload_address:	.skip 8
low_stack:	.skip 8
l1_spin_rip:	.skip 8
pointer:	.skip 16

	.data
	.balign 8
	.globl l1_vmrun_rflags, l1_vmrun_gif
l1_vmrun_rflags:			/* at VMRUN: OF, SF, ZF, AF, PF, CF, flags that L2 does not have */
	.quad 0x8d7
l1_vmrun_gif:				/* GIF at VMRUN */
	.long 0
