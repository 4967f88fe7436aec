/*
 * L1's first instructions: the PVH entry (32-bit, paging off), long mode with an identity map of the first 8 GiB in 2M
 * pages, then main(). Behind that run_l2(), and last L2's code.
 */
	.section .note.pvh, "a", @note
	.long 4, 4, 18			/* name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.long start

	.text
	.code32
	.globl start
start:	cli
	cld
	mov $stack_top, %esp
	movl $(pdpt + 3), pml4
	mov $(page_directories + 3), %eax
	mov $pdpt, %edi
	mov $8, %ecx
1:	mov %eax, (%edi)
	add $4096, %eax
	add $8, %edi
	loop 1b
	mov $0xe3, %eax			/* P, RW, A, D, PS: supervisor */
	mov $page_directories, %edi
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
	mov $pml4, %eax
	mov %eax, %cr3
	mov $0xc0000080, %ecx
	rdmsr
	or $0x1900, %eax		/* EFER: LME, NXE, SVME */
	wrmsr
	mov $0x80010033, %eax		/* CR0: PG, WP, NE, ET, MP, PE */
	mov %eax, %cr0
	lgdt gdt_pointer
	ljmp $8, $1f
	.code64
1:	mov $16, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	xor %eax, %eax
	mov %eax, %fs
	mov %eax, %gs
	lea stack_top(%rip), %rsp
	call main
1:	cli
	hlt
	jmp 1b

/* run_l2(vmcb): VMLOAD, VMRUN, VMSAVE; L2's RBX, RCX, RDX, RSI, RDI and RBP behind the #VMEXIT are in l2_registers. */
	.globl run_l2
run_l2:	push %rbx
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
	mov %rdi, %rax
	xor %ebx, %ebx
	xor %ecx, %ecx
	xor %edx, %edx
	xor %esi, %esi
	xor %edi, %edi
	xor %ebp, %ebp
	vmload %rax
	vmrun %rax
	vmsave %rax
	mov %rbx, l2_registers(%rip)
	mov %rcx, l2_registers + 8(%rip)
	mov %rdx, l2_registers + 16(%rip)
	mov %rsi, l2_registers + 24(%rip)
	mov %rdi, l2_registers + 32(%rip)
	mov %rbp, l2_registers + 40(%rip)
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbp
	pop %rbx
	cld
	ret

	.data
	.balign 16
gdt:	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
	.word 23
	.quad gdt

	.bss
	.balign 4096
pml4:	.skip 4096
pdpt:	.skip 4096
page_directories:
	.skip 8 * 4096
	.globl host_save, l2_registers
host_save:
	.skip 4096
stack:	.skip 8192
stack_top:
l2_registers:
	.skip 48

/*
 * L2's code, a piece for each VMRUN; L1 copies it to the beginning of L2's code page. In front of each access RDI is its
 * address, RAX the value, and the status flags are those of a comparison of equals.
 */
	.text
