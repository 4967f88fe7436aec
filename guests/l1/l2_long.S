/*
 * L2 in 64-bit mode: takes probes from its mailbox and does them, one after the other, until one
 * faults (L1 then re-enters at l2_long_entry with the next index) or the list ends with VMMCALL.
 * Position-independent: the page is mapped twice, for CPL 0 and for CPL 3. 
 *
 * In:  rsi = the mailbox (gVA), r12 = index of the first probe to do.
 * At every labelled access: rdi = address, rax = value, and the status flags are those of
 * `cmp %ecx, %ecx` (ZF and PF), so that the checker knows the whole saved state.
 */
#include "wire.h"

	.macro ACCESS name:vararg		/* a label that the checker finds by name, then the access */
	.globl l2_long_\name
	cmp %ecx, %ecx
l2_long_\name:
	.endm

	.macro BY_SIZE kind, i1, i2, i4, i8	/* one access for each operand size */
\kind:	mov TW_AT_PROBE_SIZE(%rbp), %ecx
	cmp $2, %ecx
	jb 1f
	je 2f
	cmp $4, %ecx
	je 4f
	ACCESS \kind\()_8
	\i8
	jmp done
1:	ACCESS \kind\()_1
	\i1
	jmp done
2:	ACCESS \kind\()_2
	\i2
	jmp done
4:	ACCESS \kind\()_4
	\i4
	jmp done
	.endm

	.section .text.l2, "ax"
	.balign 4096
	.globl l2_long_page, l2_long_entry
l2_long_page:
l2_long_entry:
	mov %r12, %rbp
	shl $5, %rbp
	add %rsi, %rbp
	mov TW_AT_PROBE_KIND(%rbp), %ecx
	and $63, %ecx
	mov TW_AT_PROBE_ADDRESS(%rbp), %rdi
	mov TW_AT_PROBE_VALUE(%rbp), %rax
	lea table(%rip), %rbx
	movslq (%rbx, %rcx, 4), %rdx
	add %rbx, %rdx
	jmp *%rdx

done:	mov %rax, TW_AT_PROBE_RESULT(%rbp)
	inc %r12
	jmp l2_long_entry

end:	ACCESS end
	vmmcall
	jmp l2_long_entry

	BY_SIZE read, "movb (%rdi), %al", "movw (%rdi), %ax", "movl (%rdi), %eax", "movq (%rdi), %rax"
	BY_SIZE write, "movb %al, (%rdi)", "movw %ax, (%rdi)", "movl %eax, (%rdi)", "movq %rax, (%rdi)"
	BY_SIZE rmw, "lock xaddb %al, (%rdi)", "lock xaddw %ax, (%rdi)", "lock xaddl %eax, (%rdi)", "lock xaddq %rax, (%rdi)"

fetch:	lea done(%rip), %rbx		/* the target loads eax with its own name and jumps to rbx */
	ACCESS fetch
	jmp *%rdi

invlpg:	ACCESS invlpg
	invlpg (%rdi)
	jmp done

	.macro ONE name, instruction:vararg
\name:	ACCESS \name
	\instruction
	jmp done
	.endm
	ONE rdcr0, mov %cr0, %rax
	ONE rdcr2, mov %cr2, %rax
	ONE rdcr3, mov %cr3, %rax
	ONE rdcr4, mov %cr4, %rax
	ONE rdcr8, mov %cr8, %rax
	ONE rddr6, mov %dr6, %rax
	ONE rddr7, mov %dr7, %rax
	ONE wrcr0, mov %rax, %cr0
	ONE wrcr2, mov %rax, %cr2
	ONE wrcr3, mov %rax, %cr3
	ONE wrcr4, mov %rax, %cr4
	ONE wrcr8, mov %rax, %cr8
	ONE wrdr6, mov %rax, %dr6
	ONE wrdr7, mov %rax, %dr7
	ONE wrrsp, mov %rax, %rsp

rdflags:
	ACCESS rdflags
	mov %rsp, %rdx			/* the mailbox page's end is stack for these two */
	lea 4096(%rsi), %rsp
	pushf
	pop %rax
	mov %rdx, %rsp
	jmp done

wrflags:
	ACCESS wrflags
	mov %rsp, %rdx
	lea 4096(%rsi), %rsp
	push %rax
	popf
	mov %rdx, %rsp
	jmp done

	/* the mailbox page's last 16 bytes hold what SGDT and the like store and load */
	.set SCRATCH, 4080
rdgdtr:	ACCESS rdgdtr
	sgdt SCRATCH(%rsi)
	mov SCRATCH + 2(%rsi), %rax
	jmp done
rdgdtl:	ACCESS rdgdtl
	sgdt SCRATCH(%rsi)
	movzwl SCRATCH(%rsi), %eax
	jmp done
rdidtr:	ACCESS rdidtr
	sidt SCRATCH(%rsi)
	mov SCRATCH + 2(%rsi), %rax
	jmp done
rdidtl:	ACCESS rdidtl
	sidt SCRATCH(%rsi)
	movzwl SCRATCH(%rsi), %eax
	jmp done
wrgdtr:	movw $0x27, SCRATCH(%rsi)	/* limits unlike those in the VMCB */
	mov %rax, SCRATCH + 2(%rsi)
	ACCESS wrgdtr
	lgdt SCRATCH(%rsi)
	jmp done
wridtr:	movw $0x13f, SCRATCH(%rsi)
	mov %rax, SCRATCH + 2(%rsi)
	ACCESS wridtr
	lidt SCRATCH(%rsi)
	jmp done
rdldtr:	ACCESS rdldtr
	xor %eax, %eax
	sldt %eax
	jmp done
rdtr:	ACCESS rdtr
	xor %eax, %eax
	str %eax
	jmp done
	ONE wres, mov %eax, %es
	ONE wrds, mov %eax, %ds

rdrsp:
	ACCESS rdrsp
	mov %rsp, %rax
	jmp done

rdmsr:	mov %edi, %ecx
	ACCESS rdmsr
	rdmsr
	shl $32, %rdx
	or %rdx, %rax
	jmp done

wrmsr:	mov %edi, %ecx
	mov %rax, %rdx
	shr $32, %rdx
	ACCESS wrmsr
	wrmsr
	jmp done

rdseg:
	ACCESS rdseg
	xor %eax, %eax			/* es, cs, ss, ds: 16 bits each, from the lowest */
	mov %ds, %eax
	shl $16, %rax
	mov %ss, %ecx
	or %rcx, %rax
	shl $16, %rax
	mov %cs, %ecx
	or %rcx, %rax
	shl $16, %rax
	mov %es, %ecx
	or %rcx, %rax
	jmp done

	/* L2's handlers, four bytes each: that one is reached, and with which frame, is all there is to see */
	.balign 4
	.globl l2_long_vectors
l2_long_vectors:
	.rept 32
	.balign 4
	hlt
	jmp . - 1
	.endr

	.balign 4
	.macro ENTRY name
	.long \name - table
	.endm
table:
	.irp name, end, read, write, rmw, fetch, invlpg, end, end
	ENTRY \name
	.endr
	.irp name, rdcr0, rdcr2, rdcr3, rdcr4, rdcr8, rddr6, rddr7, end
	ENTRY \name
	.endr
	.irp name, wrcr0, wrcr2, wrcr3, wrcr4, wrcr8, wrdr6, wrdr7, end
	ENTRY \name
	.endr
	.irp name, rdmsr, wrmsr, rdflags, wrflags, rdseg, rdrsp, wrrsp, end
	ENTRY \name
	.endr
	.irp name, rdgdtr, rdgdtl, rdidtr, rdidtl, wrgdtr, wridtr, rdldtr, rdtr, wres, wrds
	ENTRY \name
	.endr
	.rept 22
	ENTRY end
	.endr
	.org l2_long_page + 4096		/* an error here: L2 has one page */
