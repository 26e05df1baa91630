/*
 * Registers that a stopped and restarted thread must find again: all general ones but rsp and the
 * loop counter, the arithmetic flags and DF, x87 with its control word, MXCSR, the vector registers
 * as wide as the CPU has them, and the AVX-512 masks.
 *
 * probe_registers() loads them, spins without touching one of them (lea and jrcxz leave the flags
 * alone), and stores what it finds. It is assembly as a whole: the compiler must not come between.
 */
#ifndef REGISTERS_H
#define REGISTERS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct registers {
	uint64_t general[14]; /*   0: rax rbx rdx rsi rdi rbp r8..r15 */
	uint64_t flags;       /* 112 */
	uint32_t mxcsr;       /* 120 */
	uint16_t control;     /* 124: the x87 control word */
	uint16_t pad;
	uint8_t x87[8][16];   /* 128: ten bytes each */
	uint64_t mask[8];     /* 256: k0 (not used) .. k7 */
	uint8_t vector[32][64]; /* 320 */
};                        /* 2368 bytes */
_Static_assert(offsetof(struct registers, x87) == 128, "layout known to the assembly");
_Static_assert(offsetof(struct registers, vector) == 320, "layout known to the assembly");
_Static_assert(sizeof(struct registers) == 2368, "layout known to the assembly");

/* io[0] is loaded, io[1] receives; level 0: SSE, 1: AVX, 2: AVX-512. */
void probe_registers(struct registers io[2], long spins, long level);
extern char probe_spin_start[], probe_spin_end[];

__asm__(
	".text\n.globl probe_registers, probe_spin_start, probe_spin_end\n"
	".type probe_registers, @function\nprobe_registers:\n"
	"push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
	"push %rdx\n push %rdi\n mov %rsi, %rcx\n mov %rdi, %rax\n"
	"sub $16, %rsp\n stmxcsr 8(%rsp)\n ldmxcsr 120(%rax)\n"
	"fninit\n fldcw 124(%rax)\n"
	".irp n,7,6,5,4,3,2,1,0\n fldt (128+16*\\n)(%rax)\n .endr\n"
	"cmp $1, %rdx\n je 1f\n ja 2f\n"
	".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n movups (320+64*\\n)(%rax), %xmm\\n\n .endr\n"
	"jmp 3f\n"
	"1: .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
	"vmovups (320+64*\\n)(%rax), %ymm\\n\n .endr\n jmp 3f\n"
	"2: .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
	"vmovups (320+64*\\n)(%rax), %zmm\\n\n .endr\n"
	".irp n,1,2,3,4,5,6,7\n kmovq (256+8*\\n)(%rax), %k\\n\n .endr\n"
	"3: push 112(%rax)\n"
	"mov 8(%rax), %rbx\n mov 16(%rax), %rdx\n mov 24(%rax), %rsi\n mov 32(%rax), %rdi\n"
	"mov 40(%rax), %rbp\n mov 48(%rax), %r8\n mov 56(%rax), %r9\n mov 64(%rax), %r10\n"
	"mov 72(%rax), %r11\n mov 80(%rax), %r12\n mov 88(%rax), %r13\n mov 96(%rax), %r14\n"
	"mov 104(%rax), %r15\n mov 0(%rax), %rax\n popfq\n"
	"probe_spin_start:\n lea -1(%rcx), %rcx\n jrcxz 4f\n jmp probe_spin_start\n"
	"probe_spin_end: 4: pushfq\n cld\n push %rax\n"
	"mov 32(%rsp), %rax\n add $2368, %rax\n" /* rax flags mxcsr(16) io */
	"mov %rbx, 8(%rax)\n mov %rdx, 16(%rax)\n mov %rsi, 24(%rax)\n mov %rdi, 32(%rax)\n"
	"mov %rbp, 40(%rax)\n mov %r8, 48(%rax)\n mov %r9, 56(%rax)\n mov %r10, 64(%rax)\n"
	"mov %r11, 72(%rax)\n mov %r12, 80(%rax)\n mov %r13, 88(%rax)\n mov %r14, 96(%rax)\n"
	"mov %r15, 104(%rax)\n pop %rbx\n mov %rbx, 0(%rax)\n pop %rbx\n mov %rbx, 112(%rax)\n"
	"stmxcsr 120(%rax)\n ldmxcsr 8(%rsp)\n fnstcw 124(%rax)\n"
	".irp n,0,1,2,3,4,5,6,7\n fstpt (128+16*\\n)(%rax)\n .endr\n fninit\n"
	"mov 24(%rsp), %rdx\n cmp $1, %rdx\n je 1f\n ja 2f\n"
	".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n movups %xmm\\n, (320+64*\\n)(%rax)\n .endr\n"
	"jmp 3f\n"
	"1: .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
	"vmovups %ymm\\n, (320+64*\\n)(%rax)\n .endr\n vzeroupper\n jmp 3f\n"
	"2: .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
	"vmovups %zmm\\n, (320+64*\\n)(%rax)\n .endr\n"
	".irp n,1,2,3,4,5,6,7\n kmovq %k\\n, (256+8*\\n)(%rax)\n .endr\n vzeroupper\n"
	"3: add $32, %rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n ret\n"
	".size probe_registers, .-probe_registers\n");

#define FLAGS_CHECKED 0xcd5UL /* CF PF AF ZF SF DF OF */

static int vector_level(void)
{
	if (__builtin_cpu_supports("avx512bw"))
		return 2;
	return __builtin_cpu_supports("avx") ? 1 : 0;
}

/* One round; the number of register groups that came back wrong. */
static long check_registers(uint64_t round, long spins)
{
	struct registers io[2];
	const int level = vector_level(), width = 16 << level, count = level == 2 ? 32 : 16;
	uint8_t *bytes = (uint8_t *)&io[0];
	long bad = 0;

	memset(io, 0, sizeof(io));
	for (size_t i = 0; i < sizeof(io[0]); i++)
		bytes[i] = (uint8_t)(round * 131 + i * 29 + (i >> 8) + 1);
	io[0].flags = 0x202 | (round * 0x9e5 & FLAGS_CHECKED);
	io[0].mxcsr = 0x1f80 | (round & 3) << 13; /* exceptions masked; each way of rounding */
	io[0].control = 0x037f ^ (round & 3) << 10;
	for (int i = 0; i < 8; i++) { /* normal numbers, which fld and fstp give back bit by bit */
		memset(io[0].x87[i] + 8, 0, 8);
		io[0].x87[i][7] |= 0x80;
		io[0].x87[i][9] = 0x3f;
		io[0].x87[i][8] = (uint8_t)(0xf0 + i);
	}
	probe_registers(io, spins, level);
	bad += memcmp(io[0].general, io[1].general, sizeof(io[0].general)) != 0;
	bad += ((io[0].flags ^ io[1].flags) & FLAGS_CHECKED) != 0;
	bad += io[0].mxcsr != (io[1].mxcsr & ~0x3fU) || io[0].control != io[1].control;
	for (int i = 0; i < 8; i++)
		bad += memcmp(io[0].x87[i], io[1].x87[i], 10) != 0;
	for (int i = 0; i < count; i++)
		bad += memcmp(io[0].vector[i], io[1].vector[i], (size_t)width) != 0;
	if (level == 2)
		bad += memcmp(io[0].mask + 1, io[1].mask + 1, 7 * 8) != 0;
	return bad;
}

#endif
