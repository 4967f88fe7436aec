/*
 * l1_vmrun_legacy(vmcb): one VMRUN from 32-bit protected mode, for nested tables in the formats of that
 * mode, or with paging off. L1 leaves long mode right before it and comes back right after; C code only ever
 * runs in long mode. What the mode is made of is in l1_legacy: CR3, CR4, EFER, and PG of CR0; what long mode is,
 * in l1_long: CR4 and EFER.
 *
 * l1_switch(cr3): the way to long mode with another CR4, from 4-level to 5-level paging or back, which leads
 * through paging off.
 */
#include "wire.h"

	/* What VMSAVE is to write is overwritten, so that a field that it leaves out does not pass for saved. */
	.macro SPOIL base
	.irp offset, TW_VMLOADED
	movl $0x5a5a5a5a, \offset(\base)
	movl $0x5a5a5a5a, \offset + 4(\base)
	.endr
	.endm

	.macro STORE value, to
	mov \value, %eax
	mov %eax, \to
	movl $0, \to + 4
	.endm

	.macro READ_DEAR32 to
	STORE %cr4, \to + TW_AT_HOST_CR4
	STORE %dr6, \to + TW_AT_HOST_DR6
	STORE %dr7, \to + TW_AT_HOST_DR7
	mov $0xc0000080, %ecx
	rdmsr
	mov %eax, \to + TW_AT_HOST_EFER
	mov %edx, \to + TW_AT_HOST_EFER + 4
	mov $0x277, %ecx
	rdmsr
	mov %eax, \to + TW_AT_HOST_PAT
	mov %edx, \to + TW_AT_HOST_PAT + 4
	movl $1, \to + TW_AT_HOST_ALL_READ
	.endm

	.macro READ_HOST32 to
	STORE %cr0, \to + TW_AT_HOST_CR0
	STORE %cr3, \to + TW_AT_HOST_CR3
	STORE $0, \to + TW_AT_HOST_CR8	/* out of reach in this mode */
	movw %es, \to + TW_AT_HOST_ES
	movw %cs, \to + TW_AT_HOST_CS
	movw %ss, \to + TW_AT_HOST_SS
	movw %ds, \to + TW_AT_HOST_DS
	sgdt pointer
	mov pointer, %ax
	mov %ax, \to + TW_AT_HOST_GDT_LIMIT
	STORE pointer + 2, \to + TW_AT_HOST_GDT_BASE
	sidt pointer
	mov pointer, %ax
	mov %ax, \to + TW_AT_HOST_IDT_LIMIT
	STORE pointer + 2, \to + TW_AT_HOST_IDT_BASE
	.endm

	/* Paging off, then on again with these, or not; from 32-bit code. */
	.macro PAGING cr3, cr4, efer, pg=$0x80000000
	mov %cr0, %eax
	and $0x7fffffff, %eax
	mov %eax, %cr0
	mov \cr4, %eax
	mov %eax, %cr4
	mov \cr3, %eax
	mov %eax, %cr3
	mov $0xc0000080, %ecx
	mov \efer, %eax
	xor %edx, %edx
	wrmsr
	mov %cr0, %eax
	or \pg, %eax
	mov %eax, %cr0
	.endm

	.macro TO_32_BITS
	push $L1_CS32
	lea 5f(%rip), %rax
	push %rax
	lretq
	.code32
5:
	.endm

	.text
	.code64
	.globl l1_vmrun_legacy
l1_vmrun_legacy:
	push %rbx
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
	mov %rdi, vmcb_address(%rip)
	mov %rsp, long_rsp(%rip)
	mov %cr3, %rax
	mov %rax, long_cr3(%rip)
	mov l1_regs + TW_AT_REGS_R8(%rip), %r8
	mov l1_regs + TW_AT_REGS_R9(%rip), %r9
	mov l1_regs + TW_AT_REGS_R10(%rip), %r10
	mov l1_regs + TW_AT_REGS_R11(%rip), %r11
	mov l1_regs + TW_AT_REGS_R12(%rip), %r12
	mov l1_regs + TW_AT_REGS_R13(%rip), %r13
	mov l1_regs + TW_AT_REGS_R14(%rip), %r14
	mov l1_regs + TW_AT_REGS_R15(%rip), %r15
	TO_32_BITS
	PAGING l1_legacy, l1_legacy + 8, l1_legacy + 16, l1_legacy + 24
	lidt l1_ud_pointer
	READ_HOST32 l1_host_before
	STORE vmcb_address, l1_host_before + TW_AT_HOST_RAX
	STORE %esp, l1_host_before + TW_AT_HOST_RSP
	STORE $0x8d7, l1_host_before + TW_AT_HOST_RFLAGS
	push %eax
	popf				/* OF, SF, ZF, AF, PF, CF: flags that L2 does not have */
	mov l1_regs + TW_AT_REGS_RBX, %ebx
	mov l1_regs + TW_AT_REGS_RCX, %ecx
	mov l1_regs + TW_AT_REGS_RDX, %edx
	mov l1_regs + TW_AT_REGS_RSI, %esi
	mov l1_regs + TW_AT_REGS_RDI, %edi
	mov l1_regs + TW_AT_REGS_RBP, %ebp
	mov $l1_vmload_page, %eax
l1_vmload_instruction:
	vmload %eax
	mov vmcb_address, %eax
	.balign 16			/* no page's end up to VMRUN, so that no walk comes after the MOVB */
	movb $1, l1_pae_pdpt		/* QEMU TCG sets A in a PDPTE of PAE mode; KVM wants that bit 0 at #VMEXIT */
	vmrun %eax
l1_vmrun_back:
	mov %eax, l1_host_after + TW_AT_HOST_RAX
	movl $0, l1_host_after + TW_AT_HOST_RAX + 4
	mov %esp, l1_host_after + TW_AT_HOST_RSP
	movl $0, l1_host_after + TW_AT_HOST_RSP + 4
	mov l1_host_before + TW_AT_HOST_RSP, %esp
	pushf
	popl l1_host_after + TW_AT_HOST_RFLAGS
	movl $0, l1_host_after + TW_AT_HOST_RFLAGS + 4
	cld
	cmpl $0, l1_vmrun_raised
	jne 1f
	mov vmcb_address, %eax
	SPOIL %eax
	vmsave %eax
1:	STORE %ebx, l1_regs + TW_AT_REGS_RBX
	STORE %ecx, l1_regs + TW_AT_REGS_RCX
	STORE %edx, l1_regs + TW_AT_REGS_RDX
	STORE %esi, l1_regs + TW_AT_REGS_RSI
	STORE %edi, l1_regs + TW_AT_REGS_RDI
	STORE %ebp, l1_regs + TW_AT_REGS_RBP
	READ_HOST32 l1_host_after
	READ_DEAR32 l1_host_after
	lgdt l1_gdt_pointer
	lidt l1_idt_pointer
	mov $L1_DS, %eax
	mov %eax, %ds
	mov %eax, %ss
	mov $L1_ES, %eax
	mov %eax, %es
	PAGING long_cr3, l1_long, l1_long + 8
	ljmp $L1_CS, $1f
	.code64
1:	mov %r8, l1_regs + TW_AT_REGS_R8(%rip)
	mov %r9, l1_regs + TW_AT_REGS_R9(%rip)
	mov %r10, l1_regs + TW_AT_REGS_R10(%rip)
	mov %r11, l1_regs + TW_AT_REGS_R11(%rip)
	mov %r12, l1_regs + TW_AT_REGS_R12(%rip)
	mov %r13, l1_regs + TW_AT_REGS_R13(%rip)
	mov %r14, l1_regs + TW_AT_REGS_R14(%rip)
	mov %r15, l1_regs + TW_AT_REGS_R15(%rip)
	mov long_rsp(%rip), %rsp
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbp
	pop %rbx
	ret

	/* #UD at VMLOAD or VMRUN: noted, and on as if behind VMRUN, with the flags as they were. */
	.code32
	.globl l1_ud
l1_ud:
	movl $1, l1_vmrun_raised
	cmpl $l1_vmload_instruction, (%esp)
	jne 1f
	mov vmcb_address, %eax		/* VMLOAD has raised it, and with another one in rAX than VMRUN's */
1:	add $8, %esp
	popf
	jmp l1_vmrun_back
	.code64

	.globl l1_switch
l1_switch:
	push %rbx
	mov %rdi, long_cr3(%rip)
	mov %rsp, long_rsp(%rip)
	TO_32_BITS
	PAGING long_cr3, l1_long, l1_long + 8
	ljmp $L1_CS, $1f
	.code64
1:	mov long_rsp(%rip), %rsp
	pop %rbx
	ret

	.section .data
	.balign 4
l1_ud_pointer:
	.word 7 * 8 - 1
	.long l1_ud_idt

	.section .bss
	.balign 16
	.globl l1_legacy, l1_long, l1_ud_gate, l1_vmrun_raised
l1_legacy:	.skip 32
l1_long:	.skip 16
l1_ud_idt:	.skip 6 * 8
l1_ud_gate:	.skip 8
l1_vmrun_raised: .skip 8
vmcb_address:	.skip 8
long_rsp:	.skip 8
long_cr3:	.skip 8
pointer:	.skip 16
