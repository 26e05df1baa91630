/* Restartable sequences, and the area of theirs that the kernel writes; part of stops.c. */
#ifndef SEQUENCES_H
#define SEQUENCES_H

static struct { volatile uint64_t count; char pad[56]; } counters[CPUS] __attribute__((aligned(64)));
static _Atomic uint64_t made;
static _Atomic int halt, halted, nthreads;

/* counters[cpu].count++, slowly, and only if this thread was not moved or interrupted meanwhile. */
static int increment(struct rseq *area)
{
	uint64_t value, offset;

	asm goto volatile(
		".pushsection __rseq_cs, \"aw\"\n .balign 32\n"
		"3: .long 0, 0\n .quad 1f, 2f - 1f, 4f\n .popsection\n"
		"lea 3b(%%rip), %[value]\n mov %[value], 8(%[area])\n"
		"1: mov 4(%[area]), %k[offset]\n shl $6, %[offset]\n"
		"mov (%[base],%[offset]), %[value]\n"
		/* time for somebody to come in between */
		"mov $400, %%ecx\n 5: dec %%ecx\n jnz 5b\n"
		"inc %[value]\n mov %[value], (%[base],%[offset])\n"
		"2:\n .pushsection __rseq_failure, \"ax\"\n .byte 0x0f, 0xb9, 0x3d\n .long %c[sig]\n"
		"4: jmp %l[aborted]\n .popsection\n"
		: [value] "=&r"(value), [offset] "=&r"(offset)
		: [area] "r"(area), [base] "r"(counters), [sig] "i"(RSEQ_SIG)
		: "rcx", "memory", "cc"
		: aborted);
	return 1;
aborted:
	return 0;
}

static void *count(void *arg)
{
	struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
	uint64_t mine = 0;

	(void)arg;
	while (!halt) {
		mine += (uint64_t)increment(area);
		area->rseq_cs = 0; /* plainly outside, for a while */
		for (volatile int i = 0; i < 100; i++)
			;
	}
	made += mine;
	halted++;
	return NULL;
}

static void halt_all(int number) { halt = number; }

static void do_rseq(void)
{
	struct sigaction action = { .sa_handler = halt_all };

	must(__rseq_size > 0, "glibc registers rseq");
	must(sigaction(SIGUSR1, &action, NULL) == 0, "sigaction");
	nthreads = 6; /* more than there are CPUs: they interrupt each other */
	for (int i = 1; i < nthreads; i++)
		start(count);
	say("ready\n");
	count(NULL); /* this one too, so that no thread is in a system call */
	while (halted < nthreads)
		usleep(1000);
	uint64_t held = 0;
	for (int cpu = 0; cpu < CPUS; cpu++)
		held += counters[cpu].count;
	char text[96];
	snprintf(text, sizeof(text), "made %lu held %lu\n", (unsigned long)made, (unsigned long)held);
	say(text);
}

/* An area in the arena's page 9, by the first thread; a second one waits in a system call. */
static void *wait_for_ever(void *arg)
{
	for (;;)
		pause();
	return arg;
}

static void do_myrseq(int alone)
{
	struct rseq *area = (struct rseq *)(ARENA + 9 * PAGE);
	char text[96];

	must(__rseq_size == 0, "glibc registers no rseq (GLIBC_TUNABLES)");
	if (!alone)
		start(wait_for_ever);
	say("ready\n");
	for (;;) {
		const char *line = listen_for();

		if (!strcmp(line, "register")) {
			memset(area, 0, 32);
			must(syscall(SYS_rseq, area, 32, 0, RSEQ_SIG) == 0, "rseq");
		}
		/* be moved about: the kernel writes the area on the way back */
		for (int i = 0; i < 200; i++)
			sched_yield();
		unsigned cpu = 0;
		syscall(SYS_getcpu, &cpu, NULL, NULL);
		snprintf(text, sizeof(text), "cpu %d\n", area->cpu_id < CPUS);
		say(text);
	}
}

#endif
