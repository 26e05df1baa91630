/* The commands of victim.c; only its main thread runs them. */
#ifndef COMMANDS_H
#define COMMANDS_H

static char reply[512];

#define SAY(...) snprintf(reply, sizeof(reply), __VA_ARGS__)

/* By write(2): a confined victim may not make the calls that stdio makes. */
static void send_reply(void)
{
	size_t length = strlen(reply);

	reply[length++] = '\n';
	must(write(1, reply, length) == (ssize_t)length, "write a reply");
}

static int in_arena(long first, long n)
{
	if (first >= 0 && n > 0 && first <= arena.pages - n)
		return 1;
	SAY("err not in the arena");
	return 0;
}

static void *address_of(long p)
{
	return (void *)(uintptr_t)page_of(p);
}

static void do_sum(void)
{
	uint64_t sum = 0;
	long bad = 0, first = -1;

	for (long p = 0; p < arena.pages; p++)
		if (verify_page(p, &sum) && ++bad && first < 0)
			first = p;
	SAY("ok sum=%016lx bad=%ld first=%ld", sum, bad, first);
}

static void do_read(long p)
{
	uint64_t sum = 0;
	long bad = verify_page(p, &sum);

	SAY("ok sum=%016lx bad=%ld zero=%d", sum, bad, nonzero_words(p) == 0);
}

static void write_pages(long first, long n)
{
	for (long p = first; p < first + n; p++) {
		arena.changes[p].version++;
		fill_page(p, 1);
	}
}

/* Give [first, first + n) back to the kernel; how many pages then do not read as zeros. */
static long drop_pages(long first, long n)
{
	long bad = 0;

	must(madvise(address_of(first), (size_t)n * PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
	for (long p = first; p < first + n; p++) {
		bad += nonzero_words(p) != 0;
		arena.changes[p] = (struct change){ 0, 1 };
	}
	return bad;
}

static void restore_pages(long first, long n)
{
	for (long p = first; p < first + n; p++) {
		arena.changes[p] = (struct change){ 0, 0 };
		fill_page(p, 0);
	}
}

/* In the child: what it inherits is right, and stays so whatever it does with the rest. */
static long child_bad(void)
{
	long bad = verify(0, arena.pages, NULL), third = arena.pages / 3;

	for (long p = 0; p < third; p += 3)
		write_pages(p, 1);
	if (third)
		bad += drop_pages(third, third);
	bad += verify(0, arena.pages, NULL);
	bad += drop_pages(0, arena.pages);
	return bad + verify(0, arena.pages, NULL);
}

static void do_fork(void)
{
	int status = -1;
	pid_t child = fork();

	must(child >= 0, "fork");
	if (!child)
		_exit(child_bad() ? 1 : 0);
	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	SAY("ok child=%d bad=%ld", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status),
	    verify(0, arena.pages, NULL));
}

static struct {
	_Atomic int stop;
	_Atomic long reads, bad;
} hammer;

/* Verify pages at random; a page that the dropper holds meanwhile does not count. */
static void *reader_thread(void *arg)
{
	uint64_t state = (uint64_t)(uintptr_t)arg;

	while (!hammer.stop) {
		long p = (long)((state = mix(state)) % (uint64_t)arena.pages);
		uint32_t before = __atomic_load_n(&arena.flux[p], __ATOMIC_ACQUIRE);
		long bad = verify_page(p, NULL);

		atomic_thread_fence(memory_order_acquire);
		if (before % 2 == 0 && before == __atomic_load_n(&arena.flux[p], __ATOMIC_RELAXED)) {
			hammer.reads++;
			hammer.bad += bad != 0;
		}
	}
	return NULL;
}

static void turn_flux(long first, long n)
{
	for (long p = first; p < first + n; p++)
		__atomic_add_fetch(&arena.flux[p], 1, __ATOMIC_SEQ_CST);
}

/* Drop some pages, see that they are zeros, and fill them as they were. */
static long drop_and_refill(long first, long n)
{
	struct change kept[16];
	long bad;

	memcpy(kept, &arena.changes[first], (size_t)n * sizeof(kept[0]));
	turn_flux(first, n);
	bad = drop_pages(first, n);
	memcpy(&arena.changes[first], kept, (size_t)n * sizeof(kept[0]));
	for (long p = first; p < first + n; p++)
		fill_page(p, 0);
	turn_flux(first, n);
	return bad;
}

static void do_hammer(double seconds)
{
	int64_t end = now_ns() + (int64_t)(seconds * 1e9);
	uint64_t state = (uint64_t)end;
	long drops = 0, stale = 0;
	pthread_t readers[2];

	hammer.stop = 0;
	hammer.reads = hammer.bad = 0;
	for (uintptr_t i = 0; i < 2; i++)
		must((errno = pthread_create(&readers[i], NULL, reader_thread, (void *)(i + 1))) == 0,
		     "pthread_create");
	do {
		long n = 1 + (long)((state = mix(state)) % 16);
		n = n < arena.pages ? n : arena.pages;
		long first = (long)((state = mix(state)) % (uint64_t)(arena.pages - n + 1));
		stale += drop_and_refill(first, n);
		drops += n;
	} while (now_ns() < end || !hammer.reads);
	hammer.stop = 1;
	for (int i = 0; i < 2; i++)
		pthread_join(readers[i], NULL);
	errors.arena += hammer.bad + stale;
	SAY("ok reads=%ld drops=%ld bad=%ld stale=%ld", (long)hammer.reads, drops, (long)hammer.bad,
	    stale);
}

static void do_errors(void)
{
	long rounds = alone.rounds;

	for (int i = 0; i < nworkers; i++)
		rounds += workers[i].rounds;
	SAY("ok eintr=%ld early=%ld wrong=%ld registers=%ld writer=%ld arena=%ld rounds=%ld idle=%d",
	    (long)errors.eintr, (long)errors.early, (long)errors.wrong, (long)errors.registers,
	    (long)errors.writer, (long)errors.arena, rounds, idle_workers());
}

static void do_range(const char *name, long first, long n)
{
	if (!in_arena(first, n))
		return;
	if (!strcmp(name, "read")) {
		do_read(first);
	} else if (!strcmp(name, "write")) {
		write_pages(first, n);
		SAY("ok");
	} else if (!strcmp(name, "restore")) {
		restore_pages(first, n);
		SAY("ok");
	} else {
		long bad = drop_pages(first, n);
		errors.arena += bad;
		SAY("ok bad=%ld", bad);
	}
}

static void answer(char *line)
{
	char name[32] = "";
	double first = 0, n = 1;
	int given = sscanf(line, "%31s %lf %lf", name, &first, &n);

	if (!strcmp(name, "sum"))
		do_sum();
	else if (!strcmp(name, "errors"))
		do_errors();
	else if (!strcmp(name, "addr"))
		SAY("ok address=%#lx pages=%ld own=%#lx spin=%#lx spin_end=%#lx",
		    (unsigned long)arena.words, arena.pages, (unsigned long)own_pages,
		    (unsigned long)probe_spin_start, (unsigned long)probe_spin_end);
	else if (!strcmp(name, "quit"))
		_exit(0);
	else if (given > 1 && (!strcmp(name, "read") || !strcmp(name, "write") ||
			       !strcmp(name, "restore") || !strcmp(name, "dontneed")))
		do_range(name, (long)first, (long)n);
	else if (options.seccomp && (!strcmp(name, "fork") || !strcmp(name, "hammer")))
		SAY("err the seccomp filter would kill it");
	else if (!strcmp(name, "fork"))
		do_fork();
	else if (!strcmp(name, "hammer") && given > 1)
		do_hammer(first);
	else
		SAY("err no such command");
}

/* Read one line and answer it. An interruption of the read is an error if it is the work. */
static void answer_line(int is_work)
{
	static char line[256];
	size_t used = 0;

	while (!used || line[used - 1] != '\n') {
		ssize_t got = read(0, line + used, 1);

		if (got == 0)
			_exit(0);
		if (got < 0 && errno == EINTR)
			errors.eintr += is_work;
		else
			must(got == 1 && ++used < sizeof(line), "read a command");
	}
	line[used - 1] = 0;
	if (is_work)
		alone.rounds++;
	answer(line);
	send_reply();
}

#endif
