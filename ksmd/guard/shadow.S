/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the pager's shadow does (shadow.py), which shares the pager's memory and must not touch it:
 * wait for the pager's end, hang up on everybody, last for a moment, end. All signals are blocked.
 * rdi: struct pollfd of the pager's pidfd, and 8 bytes further struct timespec.
 * as shadow.S -o shadow.o && objcopy -O binary -j .text shadow.o shadow.bin
 */
	.set	SYS_poll, 7
	.set	SYS_nanosleep, 35
	.set	SYS_shutdown, 48
	.set	SYS_exit_group, 231
	.set	EINTR, 4
	.set	DESCRIPTORS, 65536

	.text
	mov	%rdi, %rbx
wait:
	mov	$SYS_poll, %eax
	mov	%rbx, %rdi
	mov	$1, %esi
	mov	$-1, %rdx
	syscall
	cmp	$-EINTR, %rax
	je	wait
	cmp	$1, %rax
	jne	leave
	xor	%ebp, %ebp
hang_up:
	mov	$SYS_shutdown, %eax
	mov	%ebp, %edi
	mov	$2, %esi
	syscall
	inc	%ebp
	cmp	$DESCRIPTORS, %ebp
	jne	hang_up
	mov	$SYS_nanosleep, %eax
	lea	8(%rbx), %rdi
	xor	%esi, %esi
	syscall
leave:
	mov	$SYS_exit_group, %eax
	xor	%edi, %edi
	syscall
