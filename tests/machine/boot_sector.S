/*
 * The first sector of a disk with foreign_l1.S on it: reads the SECTORS behind itself by the BIOS, goes to protected
 * mode, copies them to where they are linked, and jumps to START with a command line of one letter, as PVH would.
 */
	.code16
	.globl sector
sector:
	xor %ax, %ax
	mov %ax, %ds
	mov %ax, %ss
	mov $0x7c00, %sp
	mov $packet, %si
	mov $0x42, %ah			/* DL is the disk */
	int $0x13
	cli
	lgdtl gdt_pointer
	mov $0x11, %eax
	mov %eax, %cr0
	ljmpl $8, $1f

	.code32
1:	mov $16, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov $0x10000, %esi
	mov $BASE, %edi
	mov $SECTORS * 512, %ecx
	rep movsb
	mov $info, %ebx
	mov $START, %eax
	jmp *%eax

	.balign 4
packet:	.byte 16, 0
	.short SECTORS, 0, 0x1000	/* to 1000:0000 */
	.long 1, 0
gdt:	.quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
	.short gdt_pointer - gdt - 1
	.long gdt
info:	.skip 24
	.long letter, 0
letter:	.asciz "x"
	.org 510
	.short 0xaa55
