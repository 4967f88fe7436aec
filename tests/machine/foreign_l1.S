/*
 * A hypervisor that knows nothing of twinwalk: PVH or multiboot, long mode, nested paging. Its L2 shares its tables, and makes
 * #NPFs, a #PF, CPUIDs and VMMCALLs, ROUNDS times over. The first letter of the command line: `f` forgets the flush when
 * it takes a page away, `r` begins with the VMRUN of an empty VMCB, `n` never executes VMRUN, `h` hangs, `v` has an
 * L2 that executes VMRUN too, `g` flushes by INVLPGA alone, `c` changes to another nested table each round, with no flush,
 * `e` never ends, `s` has a second processor spin meanwhile, `b` has it run a guest of its own, by tables of its own. It
 * ends by a reset.
 */
	.set ROUNDS, 25
	.set HOLE, 0x3fe00000		/* the gPA that is mapped on demand, to PAGE */
	.set PAGE, 0x1000000
	.set NOWHERE, 0x40000000	/* a gVA that L2's tables do not have */

	.macro fill asid, ncr3, rip, rsp	/* the VMCB at RBP */
	movl $(1 << 14), 0x08(%rbp)	/* #PF */
	movl $(1 << 18), 0x0c(%rbp)	/* CPUID */
	movl $3, 0x10(%rbp)		/* VMRUN, VMMCALL */
	movl $\asid, 0x58(%rbp)
	movl $1, 0x90(%rbp)
	movl $\ncr3, 0xb0(%rbp)
	movw $8, 0x410(%rbp)
	movw $0x29b, 0x412(%rbp)
	movl $-1, 0x414(%rbp)
	movw $16, 0x420(%rbp)
	movw $0xc93, 0x422(%rbp)
	movl $-1, 0x424(%rbp)
	movl $0x1d00, 0x4d0(%rbp)	/* EFER: SVME, NXE, LMA, LME */
	movl $0x20, 0x548(%rbp)
	movl $pml4, 0x550(%rbp)
	mov $0x80010031, %eax
	mov %rax, 0x558(%rbp)
	movl $0x400, 0x560(%rbp)
	movl $0xffff0ff0, %eax
	mov %rax, 0x568(%rbp)
	movl $2, 0x570(%rbp)
	movl $\rip, 0x578(%rbp)
	movl $\rsp, 0x5d8(%rbp)
	mov $0x00070406, %eax
	mov %rax, 0x668(%rbp)
	.endm

#ifdef MULTIBOOT
	.text
	.long 0x1badb002, 0, -0x1badb002
#else
	.section .note.pvh, "a", @note
	.long 4, 4, 18
	.asciz "Xen"
	.long start

	.text
#endif
	.code32
	.globl start
start:
	cli
	mov %eax, %edx
	mov $'x', %al
	cmp $0x2badb002, %edx		/* multiboot: its command line is not looked at */
	je 1f
	mov 24(%ebx), %esi		/* hvm_start_info.cmdline_paddr */
	mov (%esi), %al
1:
	mov %al, letter
	mov $stack_top, %esp
	movl $(pdpt + 7), pml4
	movl $(pd + 7), pdpt
	movl $(npdpt + 7), npml4
	movl $(npd + 7), npdpt
	movl $(other_npdpt + 7), other_npml4
	movl $(other_npd + 7), other_npdpt
	mov $0x87, %eax			/* P, RW, US, PS */
	xor %ecx, %ecx
1:	mov %eax, pd(, %ecx, 8)
	mov %eax, npd(, %ecx, 8)
	mov %eax, other_npd(, %ecx, 8)
	add $0x200000, %eax
	inc %ecx
	cmp $512, %ecx
	jne 1b
	movl $0, npd + (HOLE >> 21) * 8
	movl $0, other_npd + (HOLE >> 21) * 8
	movw $0xfeeb, 0x8000		/* jmp . at the start-up page */
	cmpb $'s', letter
	je 1f
	cmpb $'b', letter
	jne 2f
	mov $second, %esi
	mov $0x8000, %edi
	mov $second_end - second, %ecx
	rep movsb
1:	movl $0xc4500, 0xfee00300	/* ICR: INIT, then SIPI with vector 8, to all but us */
	mov $100000, %ecx
1:	dec %ecx
	jnz 1b
	movl $0xc4608, 0xfee00300
2:
	mov $0x20, %eax
	mov %eax, %cr4
	mov $pml4, %eax
	mov %eax, %cr3
	mov $0xc0000080, %ecx
	rdmsr
	or $0x1900, %eax		/* LME, NXE, SVME */
	wrmsr
	mov $0x80010031, %eax
	mov %eax, %cr0
	lgdt gdt_pointer
	ljmp $8, $long

	.code64
long:	mov $stack_top, %esp
	mov $16, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov letter, %al
	cmp $'n', %al
	je reset
hang:	cmp $'h', %al
	je hang

	mov $host_save, %eax
	xor %edx, %edx
	mov $0xc0010117, %ecx		/* VM_HSAVE_PA */
	wrmsr
	mov $vmcb, %ebp
	cmpb $'r', letter
	jne fill
	mov %rbp, %rax
	clgi
	vmrun
	stgi
fill:
	fill 1, npml4, l2, l2_stack_top
	mov $ROUNDS, %ebx
	cmpb $'e', letter
	jne run
	mov $-1, %ebx

run:	mov %rbp, %rax
	clgi
	vmrun
	stgi
	movb $0, 0x5c(%rbp)
	mov 0x70(%rbp), %eax
	cmp $0x400, %eax
	je npf
	cmp $0x72, %eax
	je cpuid_exit
	cmp $0x4e, %eax
	je pf
	cmp $0x80, %eax
	je own_vmrun
	cmp $0x81, %eax
	jne reset
	addl $3, 0x578(%rbp)		/* VMMCALL ends a round */
	cmpb $'c', letter
	jne 2f
	mov $npml4, %eax
	mov $npd, %ecx
	cmp %eax, 0xb0(%rbp)
	jne 4f
	mov $other_npml4, %eax
	mov $other_npd, %ecx
4:	mov %eax, 0xb0(%rbp)
	mov %ecx, current
2:	mov current, %ecx
	movl $0, (HOLE >> 21) * 8(%rcx)
	cmpb $'f', letter
	je 1f
	cmpb $'c', letter
	je 1f
	cmpb $'g', letter
	jne 3f
	mov $HOLE, %eax
	mov $1, %ecx
	invlpga
	jmp 1f
3:	movb $1, 0x5c(%rbp)
1:	dec %ebx
	jnz run
	cmpb $'b', letter
	jne reset
2:	cmpb $0, is_done
	je 2b
reset:	mov $0x3f8, %edx
	mov $message, %esi
	mov $message_end - message, %ecx
	rep outsb
	mov $0xfe, %al
	out %al, $0x64
1:	jmp 1b

npf:	mov $PAGE + 0x85, %eax		/* first read-only */
	testb $2, 0x78(%rbp)
	jz 1f
	or $2, %eax
1:	mov current, %ecx
	mov %eax, (HOLE >> 21) * 8(%rcx)
	jmp run
cpuid_exit:
	addl $2, 0x578(%rbp)
	jmp run
own_vmrun:
	addl $3, 0x578(%rbp)
	jmp run
pf:	addl $8, 0x578(%rbp)
	jmp run

	.code16
second:	cli				/* at 0x8000, and CS too */
	mov %cs, %ax
	mov %ax, %ds
	lgdtl second_gdt - second
	mov %cr0, %eax
	or $1, %eax
	mov %eax, %cr0
	ljmpl $24, $second_32
second_gdt:
	.short current - gdt - 1
	.long gdt
second_end:
	.code32
second_32:
	mov $16, %eax
	mov %eax, %ds
	mov %eax, %ss
	mov $0x20, %eax
	mov %eax, %cr4
	mov $pml4, %eax
	mov %eax, %cr3
	mov $0xc0000080, %ecx
	rdmsr
	or $0x1900, %eax
	wrmsr
	mov $0x80010031, %eax
	mov %eax, %cr0
	ljmp $8, $second_64
	.code64
second_64:
	mov $second_stack_top, %esp
	mov $second_save, %eax
	xor %edx, %edx
	mov $0xc0010117, %ecx
	wrmsr
	mov $second_vmcb, %ebp
	fill 2, other_npml4, second_l2, second_l2_stack_top
	mov $4 * ROUNDS, %ebx
1:	mov %rbp, %rax
	clgi
	vmrun
	stgi
	addl $3, 0x578(%rbp)
	dec %ebx
	jnz 1b
	movb $1, is_done
2:	pause
	jmp 2b
second_l2:
	mov second_stack_top, %ecx
	vmmcall
	jmp second_l2

l2:	mov HOLE, %ecx
	cpuid
	movl $1, HOLE
	mov NOWHERE, %rcx		/* eight bytes */
	cmpb $'v', letter
	jne 1f
	mov $vmcb, %eax
	vmrun
1:	vmmcall
	jmp l2

	.section .rodata
message: .ascii "the foreign L1 is done\n"
message_end:

	.data
	.balign 8
gdt:	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
current: .long npd
gdt_pointer:
	.short current - gdt - 1
	.long gdt
is_done: .byte 0
letter:	.byte 0

	.bss
	.balign 4096
pml4:	.skip 4096
pdpt:	.skip 4096
pd:	.skip 4096
npml4:	.skip 4096
npdpt:	.skip 4096
npd:	.skip 4096
other_npml4: .skip 4096
other_npdpt: .skip 4096
other_npd: .skip 4096
vmcb:	.skip 4096
host_save: .skip 4096
second_vmcb: .skip 4096
second_save: .skip 4096
	.skip 4096
second_stack_top:
	.skip 4096
second_l2_stack_top:
	.skip 4096
stack_top:
	.skip 4096
l2_stack_top:
