/*
 * A random program that is the same for everyone with one seed: operations on its address space,
 * loads and stores, system calls through buffers, threads, signals, children. Twins must tell the
 * same; when one of them is merged and another is not, whatever differs is the merging's doing.
 *
 * Started with --seed=N --directory=D [--offset=PAGES] [--trace=FILE]; "ready" on stdout, then each
 * line on stdin is answered by one line (or more, for `pages`):
 *
 *   run N     N operations: "<operations so far> <digest of all results and of every page>"
 *   pages     the digest of every page by itself, "<slot> <page> <digest>", then "end"
 *   quit
 *
 * The trace has a line for each operation: its number, its name, the digest after it, the range it
 * chose last and how it was used. Children write theirs, and the digest of every page, beside it.
 */
#include <sys/personality.h>

#include "program_life.h"

#define OP(name, weight) { #name, op_##name, weight }
static const struct op {
	const char *name;
	void (*run)(u64 *digest, struct rng *r);
	int weight;
} ops[] = {
	OP(fresh, 60), OP(paint, 120), OP(poke, 120), OP(look, 120), OP(unmap, 30), OP(over, 50),
	OP(protect, 60), OP(advise, 160), OP(advise_other, 60), OP(lock, 20), OP(remap, 80),
	OP(brk, 20), OP(pipe, 80), OP(file, 60), OP(direct, 40), OP(process_vm, 50), OP(mem, 40),
	OP(copy, 80),
	/* not in children: */
	OP(exec, 8), OP(signal, 40), OP(malloc, 50), OP(faults, 12), OP(thread, 20),
	OP(fork, 3), /* seldom: what fork has shared cannot be merged before it is written */
};
#define NOPS ((int)(sizeof ops / sizeof *ops))
#define CHILD_OPS 18

static FILE *trace;
static const char *trace_path;
static long done;

/* A child's own trace, TRACE.N for the N-th fork; 0: it is complete. */
static void trace_child(long number)
{
	char path[300];

	if (!trace)
		return;
	if (!number) {
		fflush(trace);
		return;
	}
	snprintf(path, sizeof path, "%s.%ld", trace_path, number);
	trace_path = strdup(path);
	trace = fopen(path, "we"); /* what the parent has not written yet stays its own */
}

static const struct op *choose(struct rng *r, int count)
{
	long total = 0, at;

	for (int i = 0; i < count; i++)
		total += ops[i].weight;
	at = below(r, total);
	for (int i = 0;; i++)
		if ((at -= ops[i].weight) < 0)
			return &ops[i];
}

static void step(u64 *digest, struct rng *r, int count)
{
	const struct op *op = choose(r, count);

	noted.how = noted.slot = noted.first = noted.pages = 0;
	if (count == NOPS && done % 50 == 0)
		end_faults();
	op->run(digest, r);
	if (trace)
		fprintf(trace, "%ld %s %016lx (slot %ld pages %ld+%ld, %ld)\n", done, op->name,
			*digest, noted.slot, noted.first, noted.pages, noted.how);
	done++;
}

static void child_ops(u64 *digest, struct rng *r, long count)
{
	while (count--)
		step(digest, r, CHILD_OPS);
	if (!below(r, 8))
		op_fork(digest, r);
}

/* ---- digests ---- */

static unsigned char flags_of[SLOTS][2 * HALF / PAGE];

/* The protection, and the advice that a program relies on, of every page of every slot. */
static void read_flags(void)
{
	static const char *const named[] = { " lo", " dc", " wf", " dd" };
	static char line[65536];
	FILE *file = fopen("/proc/self/smaps", "re");
	u64 start = 0, end = 0;
	unsigned perms = 0;

	if (!file)
		die("smaps");
	memset(flags_of, 0, sizeof flags_of);
	while (fgets(line, sizeof line, file)) {
		char text[8];

		if (sscanf(line, "%lx-%lx %4s", &start, &end, text) == 3) {
			perms = 128 | (text[0] == 'r') | (text[1] == 'w') << 1;
			perms |= (text[3] == 's') << 2;
		} else if (!strncmp(line, "VmFlags:", 8) && start >= BASE + offset_bytes &&
			   end <= BASE + offset_bytes + SLOTS * STRIDE) {
			unsigned flags = perms;
			u64 at = start - BASE - offset_bytes;

			for (int i = 0; i < 4; i++)
				if (strstr(line, named[i]))
					flags |= 8u << i;
			memset(&flags_of[at / STRIDE][at % STRIDE / PAGE], (int)flags,
			       (end - start) / PAGE);
		}
	}
	fclose(file);
}

static u64 slot_page(int slot, long page)
{
	struct slot *s = slot < SLOTS ? &slots[slot] : &own[slot - SLOTS];
	u64 sum = page_sum(s->at + (u64)page * PAGE);

	if (slot < SLOTS)
		fold(&sum, flags_of[slot][(u64)(s->at - s->home) / PAGE + (u64)page]);
	return sum;
}

static long slot_pages(int slot)
{
	return slot < SLOTS ? slots[slot].pages : own[slot - SLOTS].pages;
}

/* Of a child: contents only, without the threads' memory, in which they were at work. */
static u64 whole_digest(void)
{
	u64 sum = 0;

	for (int slot = 0; slot < SLOTS; slot++)
		for (long p = 0; p < slots[slot].pages; p++) {
			u64 page = page_sum(slots[slot].at + (u64)p * PAGE);

			fold(&sum, page);
			if (trace)
				fprintf(trace, "slot %d page %ld traits %u: %016lx\n", slot, p,
					slots[slot].traits, page);
		}
	return sum;
}

static void print_pages(void)
{
	read_flags();
	for (int slot = 0; slot < SLOTS + THREADS; slot++)
		for (long p = 0; p < slot_pages(slot); p++)
			printf("%d %ld %016lx\n", slot, p, slot_page(slot, p));
	printf("end\n");
}

/* ---- life ---- */

static void run(u64 *digest, struct rng *r, long count)
{
	u64 sum = 0;

	crew_go(count / 4);
	while (count--)
		step(digest, r, NOPS);
	reap(digest);
	crew_wait(digest);
	fold(digest, handler_errors);
	for (int i = 0; i < BLOCKS; i++)
		fold(digest, block_errors(i));
	read_flags();
	for (int slot = 0; slot < SLOTS + THREADS; slot++)
		for (long p = 0; p < slot_pages(slot); p++)
			fold(&sum, slot_page(slot, p));
	if (trace)
		fflush(trace);
	printf("%ld %016lx %016lx\n", done, *digest, sum);
}

static void catch(int number, void (*handler)(int, siginfo_t *, void *), int flags)
{
	struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags };

	if (sigaction(number, &action, NULL))
		die("sigaction");
}

static void set_up(const char *directory)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct itimerval often = { { 0, 3000 }, { 0, 3000 } };
	u64 unused = 0;

	lay_out();
	for (int i = 0; i < SLOTS; i++)
		slots[i].at = slots[i].home;
	open_files(directory);
	faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (faults < 0 || ioctl(faults, UFFDIO_API, &api))
		die("userfaultfd");
	timer_stack = map_at((char *)(BASE - 64 * PAGE + offset_bytes), TIMER_STACK,
			     PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	paint(&unused, timer_stack, 32, 1, 1);
	use_stack(timer_stack, TIMER_STACK);
	catch(SIGSEGV, on_fault, SA_NODEFER);
	catch(SIGBUS, on_fault, SA_NODEFER);
	catch(SIGALRM, on_signal, SA_ONSTACK | SA_RESTART);
	catch(SIGUSR1, on_signal, SA_ONSTACK | SA_RESTART);
	catch(SIGRTMIN + 3, on_signal, SA_ONSTACK | SA_RESTART);
	start_crew();
	setitimer(ITIMER_REAL, &often, NULL);
}

int main(int argc, char **argv)
{
	const char *directory = NULL;
	struct rng r = { 1 };
	u64 digest = 0;
	char line[64];

	if (argc == 3 && !strcmp(argv[1], "--child")) {
		u64 answer = mix((u64)atol(argv[2]));

		return write(1, &answer, sizeof answer) == sizeof answer ? (int)(answer & 63) : 73;
	}
	/* twins share more when their heaps lie at the same addresses */
	if (!(personality(0xffffffff) & ADDR_NO_RANDOMIZE)) {
		personality(ADDR_NO_RANDOMIZE);
		execv("/proc/self/exe", argv);
		die("execv");
	}
	set_up_heap();
	for (int i = 1; i < argc; i++) {
		char *value = strchr(argv[i], '=');

		if (!value)
			return 2;
		value++;
		unsigned long number = strtoul(value, NULL, 0);

		if (!strncmp(argv[i], "--seed=", 7)) r.state = number;
		else if (!strncmp(argv[i], "--directory=", 12)) directory = value;
		else if (!strncmp(argv[i], "--offset=", 9)) offset_bytes = number * PAGE;
		else if (!strncmp(argv[i], "--trace=", 8)) trace = fopen(trace_path = value, "we");
		else if (strncmp(argv[i], "--token=", 8)) return 2; /* for whoever selects us by it */
	}
	set_up(directory);
	setvbuf(stdout, NULL, _IOFBF, 1 << 16);
	for (printf("ready\n"), fflush(stdout); fgets(line, sizeof line, stdin); fflush(stdout)) {
		if (!strncmp(line, "run ", 4))
			run(&digest, &r, atol(line + 4));
		else if (!strcmp(line, "pages\n"))
			print_pages();
		else if (!strcmp(line, "quit\n"))
			return 0;
		else
			printf("error\n");
	}
	return 0;
}
