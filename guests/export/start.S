/*
 * L1's first instructions: the PVH entry (32-bit, paging off), long mode with an identity map of the first 8 GiB in 2M
 * pages, then main(). Behind that run_l2(), and last L2's code.
 */
	.set LA57, @LA57@			/* 1 for an L1 in 5-level paging */

	.set CR0_PG, 1 << 31
	.set CR4_PSE, 1 << 4
	.set CR4_PAE, 1 << 5
	.set CR4_LA57, 1 << 12
	.set MSR_EFER, 0xc0000080
	.set EFER_LME, 1 << 8

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
	mov $page_directories + 1, %eax	/* the same for PAE: four page directories, P alone */
	mov $pae_pdpt, %edi
	mov $4, %ecx
1:	mov %eax, (%edi)
	add $4096, %eax
	add $8, %edi
	loop 1b
	mov $0xe3, %eax			/* and for 32-bit paging: pages of 4M */
	mov $legacy_directory, %edi
	mov $1024, %ecx
1:	mov %eax, (%edi)
	add $0x400000, %eax
	add $4, %edi
	loop 1b

	movl $(pml4 + 3), pml5
	mov $(0x628 | LA57 * CR4_LA57), %eax	/* CR4: DE, PAE, OSFXSR, OSXMMEXCPT */
	mov %eax, %cr4
	mov $long_root, %eax
	mov %eax, %cr3
	mov $MSR_EFER, %ecx
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

/*
 * run_l2_from_32(vmcb, mode): the same by an L1 in PAE mode (0), in 32-bit paging (1), or without paging (2), with CR0,
 * CR4 and EFER as they are but for that. Of L2's registers it has 32 bits.
 */
	.globl run_l2_from_32
run_l2_from_32:
	push %rbx
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
	mov %edi, vmcb_address(%rip)
	mov %esi, legacy_mode(%rip)
	mov %rsp, long_rsp(%rip)
	mov %cr0, %rax
	mov %eax, long_cr0(%rip)
	mov %cr4, %rax
	mov %eax, long_cr4(%rip)
	mov %rdi, %rax
	vmload %rax
	push $0x18
	lea 1f(%rip), %rax
	push %rax
	lretq
	.code32
1:	mov long_cr0, %eax
	and $~CR0_PG, %eax
	mov %eax, %cr0
	mov $MSR_EFER, %ecx
	rdmsr
	and $~EFER_LME, %eax
	wrmsr
	mov long_cr4, %eax
	mov $pae_pdpt, %edx
	cmpl $1, legacy_mode
	jne 1f
	and $~CR4_PAE, %eax
	or $CR4_PSE, %eax
	mov $legacy_directory, %edx
1:	mov %eax, %cr4
	mov %edx, %cr3
	cmpl $2, legacy_mode
	je 1f
	mov long_cr0, %eax
	mov %eax, %cr0
1:	xor %ebx, %ebx
	xor %ecx, %ecx
	xor %edx, %edx
	xor %esi, %esi
	xor %edi, %edi
	xor %ebp, %ebp
	mov vmcb_address, %eax
	vmrun %eax
	mov %ebx, l2_registers
	mov %ecx, l2_registers + 8
	mov %edx, l2_registers + 16
	mov %esi, l2_registers + 24
	mov %edi, l2_registers + 32
	mov %ebp, l2_registers + 40
	mov long_cr0, %eax
	and $~CR0_PG, %eax
	mov %eax, %cr0
	mov long_cr4, %eax
	mov %eax, %cr4
	mov $long_root, %eax
	mov %eax, %cr3
	mov $MSR_EFER, %ecx
	rdmsr
	or $EFER_LME, %eax
	wrmsr
	mov long_cr0, %eax
	mov %eax, %cr0
	ljmp $8, $1f
	.code64
1:	mov long_rsp(%rip), %rsp
	mov vmcb_address(%rip), %eax
	vmsave %rax
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
gdt:	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
gdt_pointer:
	.word 31
	.quad gdt

	.bss
	.balign 4096
pml5:	.skip 4096
pml4:	.skip 4096
	.if LA57
	.set long_root, pml5
	.else
	.set long_root, pml4
	.endif
legacy_directory:
	.skip 4096
pae_pdpt:
	.skip 32
	.balign 4096
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
long_rsp:
	.skip 8
vmcb_address:
	.skip 4
legacy_mode:
	.skip 4
long_cr0:
	.skip 4
long_cr4:
	.skip 4

/*
 * L2's code, a piece for each VMRUN; L1 copies it to the beginning of L2's code page. In front of each access RDI is its
 * address, RAX the value, and the status flags are those of a comparison of equals.
 */
	.text
