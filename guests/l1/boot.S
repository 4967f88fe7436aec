/*
 * L1's first instructions: the PVH entry (32-bit, paging off), then long mode with an identity map
 * of the first 8 GiB in 2M pages, then l1_main(). Exceptions in L1 are reported in the shared page.
 */
#include "wire.h"

	.section .note.pvh, "a", @note
	.long 4, 4, 18			/* name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.long l1_start

	.section .text.boot, "ax"
	.code32
	.globl l1_start
l1_start:
	cli
	cld
	mov $l1_stack_top, %esp

	/* PML4[0] -> PDPT; PDPT[0..7] -> eight page directories; 4096 pages of 2M */
	movl $(l1_pdpt + 3), l1_pml4
	movl $(l1_pdpt + 3), l1_pml4 + 8 * TW_L1_HIGH_SLOT	/* the same once more: see vmrun.S */
	mov $l1_pd + 3, %eax
	mov $l1_pdpt, %edi
	mov $8, %ecx
1:	mov %eax, (%edi)
	add $4096, %eax
	add $8, %edi
	loop 1b
	mov $0xe3, %eax			/* P, RW, A, D, PS: supervisor, so that L1 may set SMEP and SMAP */
	mov $l1_pd, %edi
	xor %edx, %edx
	mov $4096, %ecx
1:	mov %eax, (%edi)
	mov %edx, 4(%edi)
	add $0x200000, %eax
	adc $0, %edx
	add $8, %edi
	loop 1b

	mov $0x628, %eax		/* CR4: DE, PAE, OSFXSR, OSXMMEXCPT */
	mov %eax, %cr4
	mov $l1_pml4 + 8, %eax		/* and PWT: see host.c */
	mov %eax, %cr3
	mov $0xc0000080, %ecx
	rdmsr
	or $0x1900, %eax		/* EFER: LME, NXE, SVME */
	wrmsr
	mov $0x80010033, %eax		/* CR0: PG, WP, NE, ET, MP, PE */
	mov %eax, %cr0
	lgdt l1_gdt_pointer
	ljmp $L1_CS, $1f

	.code64
1:	mov $L1_DS, %eax
	mov %eax, %ds
	mov %eax, %ss
	mov $L1_ES, %eax
	mov %eax, %es
	xor %eax, %eax
	mov %eax, %fs
	mov %eax, %gs
	lea l1_stack_top(%rip), %rsp

	/* what firmware left where entries without a frame lead to */
	xor %edi, %edi
	mov $4096 / 8, %ecx
	rep stosq

	/* 32 interrupt gates */
	lea l1_vectors(%rip), %rax
	lea l1_idt(%rip), %rdi
	mov $32, %ecx
1:	mov %ax, (%rdi)
	movw $L1_CS, 2(%rdi)
	movw $0x8e00, 4(%rdi)
	mov %rax, %rdx
	shr $16, %rdx
	mov %edx, 6(%rdi)
	add $16, %rax
	add $16, %rdi
	loop 1b
	lidt l1_idt_pointer(%rip)
	call l1_main

	/* sixteen bytes each: push a zero where the CPU pushes no error code, then the vector */
	.balign 16
l1_vectors:
	.set vector, 0
	.rept 32
	.balign 16
	.if !((0x60227d00 >> vector) & 1)
	push $0
	.endif
	push $vector
	jmp l1_panic
	.set vector, vector + 1
	.endr

/* One that L2 should have had, and that a hypervisor gives L1 right behind VMRUN, is noted; L1 goes on. */
l1_panic:
	push %rax
	lea l1_vmrun_behind(%rip), %rax
	cmp %rax, 24(%rsp)
	jne 1f
	cmpl $0, l1_exception_taken(%rip)
	jne 1f
	mov 8(%rsp), %eax
	inc %eax
	mov %eax, l1_exception_taken(%rip)
	pop %rax
	add $16, %rsp
	iretq
1:	pop %rax
	lea tw_shared_page(%rip), %rdi
	pop %rax
	pop %rcx
	pop %rdx
	mov %rcx, TW_AT_SHARED_PANIC_ERROR(%rdi)
	mov %rdx, TW_AT_SHARED_PANIC_RIP(%rdi)
	mov %cr2, %rcx
	mov %rcx, TW_AT_SHARED_PANIC_ADDRESS(%rdi)
	inc %eax			/* stored plus one: 0 means no panic */
	mov %eax, TW_AT_SHARED_PANIC_VECTOR(%rdi)
1:	cli
	hlt
	jmp 1b

	.section .data
	.globl l1_exception_taken
	.balign 4
l1_exception_taken:			/* its vector plus one */
	.long 0
	.balign 16
	.globl l1_gdt
l1_gdt:
	.quad 0
	.set L1_CS, 0x08
	.globl L1_CS
	.quad 0x00af9b000000ffff	/* 64-bit code */
	.set L1_DS, 0x10
	.globl L1_DS
	.quad 0x00cf93000000ffff	/* data */
	.set L1_ES, 0x18
	.globl L1_ES
	.quad 0x00cf93000000ffff	/* the same data, so that ES can be told from DS and SS */
	.set L1_CS32, 0x20
	.globl L1_CS32
	.quad 0x00cf9b000000ffff	/* 32-bit code */
l1_gdt_end:
	.balign 16
	.globl l1_gdt_pointer, l1_idt_pointer, l1_high_gdt_pointer, l1_high_idt_pointer
	.word 0, 0, 0
l1_gdt_pointer:
	.word l1_gdt_end - l1_gdt - 1
	.quad l1_gdt
	.word 0, 0, 0
l1_idt_pointer:
	.word 32 * 16 - 1
	.quad l1_idt
	.word 0, 0, 0
l1_high_gdt_pointer:
	.word l1_gdt_end - l1_gdt - 1
	.quad l1_gdt + TW_L1_HIGH
	.word 0, 0, 0
l1_high_idt_pointer:
	.word 32 * 16 - 1
	.quad l1_idt + TW_L1_HIGH

	.section .bss
	.balign 4096
	.globl l1_pml5, l1_pml4, l1_pae_pdpt, l1_legacy_pd, l1_pd
l1_pml4:	.skip 4096
l1_pdpt:	.skip 4096
l1_pd:		.skip 8 * 4096
l1_pml5:	.skip 4096		/* these three: the same map in the formats of the other modes */
l1_pae_pdpt:	.skip 4096
l1_legacy_pd:	.skip 4096
	.globl l1_idt
l1_idt:		.skip 32 * 16
		.balign 4096
l1_stack:	.skip 16384
l1_stack_top:
