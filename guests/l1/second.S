/*
 * Where L1's second processor begins after each INIT and SIPI: in real mode, at a page below 1 MiB that this is copied to.
 * It goes right into long mode with L1's map, and calls second_main().
 */
	.section .rodata
	.balign 16
	.globl second_begin, second_end
	.code16
second_begin:
	cli
	xor %eax, %eax
	mov %ax, %ds
	lgdtl SECOND_PAGE + (pointer - second_begin)
	mov $0x620, %eax		/* CR4: PAE, OSFXSR, OSXMMEXCPT */
	mov %eax, %cr4
	mov $l1_pml4, %eax
	mov %eax, %cr3
	mov $0xc0000080, %ecx
	rdmsr
	or $0x900, %eax			/* EFER: LME, NXE */
	wrmsr
	mov $0x80010033, %eax		/* CR0: PG, WP, NE, ET, MP, PE */
	mov %eax, %cr0
	ljmpl $L1_CS, $second_long
	.balign 4
pointer:
	.word 5 * 8 - 1
	.long l1_gdt
second_end:

	.globl SECOND_PAGE
	.set SECOND_PAGE, 0x8000

	.text
	.code64
second_long:
	mov $L1_DS, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	lea second_stack_top(%rip), %rsp
	call second_main
1:	cli
	hlt
	jmp 1b

	/* What an NMI or an interrupt does that L1 lets in. */
	.globl l1_nmi, l1_interrupt
l1_nmi:	movb $1, l1_nmi_taken(%rip)
	iretq
l1_interrupt:
	movb $1, l1_interrupt_taken(%rip)
	iretq

	.section .bss
	.balign 16
	.skip 1024
second_stack_top:
	.globl l1_nmi_taken, l1_interrupt_taken
l1_nmi_taken: .skip 1
l1_interrupt_taken: .skip 1
