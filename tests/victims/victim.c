/*
 * A process that checks itself: its arena's content, its waits, its registers, its threads' pages.
 *
 * Started with --option=value arguments, it prints "ready key=value ...", then answers each line on
 * stdin with one line on stdout, "ok key=value ..." or "err reason". It exits when stdin ends. The
 * commands are described in __init__.py.
 */
#include <limits.h>
#include <sys/mman.h>

#include "confine.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define HUGE (2UL << 20)

static struct {
	long pages, offset, threads, spare_fds, uid;
	unsigned long address, seed;
	const char *layout, *thp, *work;
	int heap, seccomp, namespaces;
} options = {
	.pages = 256, .spare_fds = -1, .uid = -1, .seed = 1, .layout = "runs:long", .thp = "none",
	.work = "none",
};

static enum work the_work; /* of every worker, or of the main thread when there are no workers */
static struct worker alone;
static volatile uint64_t *own_pages;

static void parse(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		char *key = argv[i], *value = strchr(key, '=');

		must(value != NULL, "an option without '='");
		*value++ = 0;
		if (!strcmp(key, "--pages")) options.pages = atol(value);
		else if (!strcmp(key, "--offset")) options.offset = atol(value);
		else if (!strcmp(key, "--threads")) options.threads = atol(value);
		else if (!strcmp(key, "--spare-fds")) options.spare_fds = atol(value);
		else if (!strcmp(key, "--uid")) options.uid = atol(value);
		else if (!strcmp(key, "--address")) options.address = strtoul(value, NULL, 0);
		else if (!strcmp(key, "--seed")) options.seed = strtoul(value, NULL, 0);
		else if (!strcmp(key, "--layout")) options.layout = value;
		else if (!strcmp(key, "--thp")) options.thp = value;
		else if (!strcmp(key, "--work")) options.work = value;
		else if (!strcmp(key, "--heap")) options.heap = atoi(value);
		else if (!strcmp(key, "--seccomp")) options.seccomp = atoi(value);
		else if (!strcmp(key, "--namespaces")) options.namespaces = atoi(value);
		else {
			fprintf(stderr, "victim: no such option: %s\n", key);
			exit(2);
		}
	}
}

static enum work work_named(const char *name)
{
	for (int i = 0; i < NWORKS; i++)
		if (!strcmp(works[i].name, name))
			return (enum work)i;
	fprintf(stderr, "victim: no such work: %s\n", name);
	exit(2);
}

static void *anonymous(void *at, size_t size, int prot, int flags)
{
	void *p = mmap(at, size, prot, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	must(p != MAP_FAILED, "mmap");
	return p;
}

/*
 * A VMA of its own: inaccessible pages on both sides keep it from melting into a neighbour.
 * offset: so many pages after a 2 MiB boundary.
 */
static void *place_arena(size_t size)
{
	uintptr_t at, room;

	if (options.heap) {
		at = (uintptr_t)sbrk(0);
		must(sbrk((intptr_t)(size + 2 * PAGE - at % PAGE)) != (void *)-1, "sbrk");
		return (void *)((at + PAGE) & ~(PAGE - 1));
	}
	if (options.address) {
		at = options.address;
		anonymous((void *)(at - PAGE), size + 2 * PAGE, PROT_NONE, MAP_FIXED_NOREPLACE);
	} else {
		room = (uintptr_t)anonymous(NULL, size + 2 * HUGE, PROT_NONE, MAP_NORESERVE);
		at = ((room + HUGE) & ~(HUGE - 1)) + (size_t)options.offset % 512 * PAGE;
		must(at > room && at + size < room + size + 2 * HUGE, "offset");
	}
	return anonymous((void *)at, size, PROT_READ | PROT_WRITE, MAP_FIXED);
}

static void make_arena(void)
{
	size_t size = (size_t)options.pages * PAGE;
	void *at = place_arena(size);

	arena.pages = options.pages;
	arena.seed = options.seed;
	arena.layout = options.layout;
	arena.words = at;
	arena.changes = anonymous(NULL, (size_t)options.pages * sizeof(*arena.changes),
				  PROT_READ | PROT_WRITE, 0);
	arena.flux = anonymous(NULL, (size_t)options.pages * sizeof(*arena.flux),
			       PROT_READ | PROT_WRITE, 0);
	if (!strcmp(options.thp, "off"))
		must(madvise(at, size, MADV_NOHUGEPAGE) == 0, "MADV_NOHUGEPAGE");
	else if (strcmp(options.thp, "none"))
		must(madvise(at, size, MADV_HUGEPAGE) == 0, "MADV_HUGEPAGE");
	for (long p = 0; p < arena.pages; p++)
		fill_page(p, 0);
	if (!strcmp(options.thp, "on"))
		must(madvise(at, size, MADV_COLLAPSE) == 0, "MADV_COLLAPSE");
}

static void ignore_signal(int number) { (void)number; }

/* SIGUSR1 interrupts a wait (the tests' proof that it would be noticed); SIGUSR2 never comes. */
static void prepare_signals(void)
{
	struct sigaction action = { .sa_handler = ignore_signal };
	sigset_t usr2;

	sigemptyset(&usr2);
	sigaddset(&usr2, SIGUSR2);
	must(sigaction(SIGUSR1, &action, NULL) == 0, "sigaction");
	must(sigprocmask(SIG_BLOCK, &usr2, NULL) == 0, "sigprocmask");
}

static void start_thread(void *(*body)(void *), void *arg)
{
	pthread_attr_t small;
	pthread_t thread;

	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 64 << 10 > PTHREAD_STACK_MIN ? 64 << 10 : PTHREAD_STACK_MIN);
	must((errno = pthread_create(&thread, &small, body, arg)) == 0, "pthread_create");
	pthread_detach(thread);
}

/* The threads begin with signals as the main thread has them; then it blocks SIGUSR1 itself. */
static void start_workers(void)
{
	sigset_t usr1;
	int all = !strcmp(options.work, "all"), pipes = 0;

	the_work = all ? W_NONE : work_named(options.work);
	nworkers = (int)options.threads;
	own_pages = anonymous(NULL, (size_t)(nworkers + 1) * OWN_PAGES * PAGE, PROT_READ | PROT_WRITE, 0);
	workers = anonymous(NULL, (size_t)(nworkers + 1) * sizeof(*workers), PROT_READ | PROT_WRITE, 0);
	if (!nworkers)
		prepare_worker(&alone, the_work, 1, own_pages);
	for (int i = 0; i < nworkers; i++) {
		enum work work = all ? (enum work)(1 + i % (NWORKS - 1)) : the_work;
		prepare_worker(&workers[i], work, (uint64_t)i + 1, own_pages + i * OWN_PAGES * WORDS);
		pipes += work == W_PIPE;
	}
	for (int i = 0; i < nworkers && (all || the_work != W_NONE); i++)
		start_thread(worker_thread, &workers[i]);
	if (nworkers) {
		sigemptyset(&usr1);
		sigaddset(&usr1, SIGUSR1);
		pthread_sigmask(SIG_BLOCK, &usr1, NULL);
	}
	if (pipes)
		start_thread(ticker_thread, NULL);
}

static int idle_workers(void)
{
	int idle = 0;

	for (int i = 0; i < nworkers; i++)
		idle += workers[i].rounds == 0;
	return idle + (!nworkers && the_work != W_NONE && the_work != W_PIPE && !alone.rounds);
}

#include "commands.h"

static void say_ready(void)
{
	long count[NKINDS] = { 0 };

	for (long p = 0; p < arena.pages; p++)
		count[kind_of(p)]++;
	SAY("ready address=%#lx pages=%ld equal=%ld distinct=%ld unique=%ld zero=%ld",
	    (unsigned long)arena.words, arena.pages, count[EQUAL] + count[TWIN],
	    count[EQUAL] + (count[TWIN] > 0), count[UNIQUE] + count[TAIL], count[ZERO]);
	send_reply();
}

/* Answer what stands on stdin; block for it only if there is nothing else to do. */
static void serve(void)
{
	struct pollfd input = { 0, POLLIN, 0 };
	int busy = !nworkers && the_work != W_NONE && the_work != W_PIPE;

	for (;;) {
		if (busy)
			one_round(&alone);
		if (!busy || poll(&input, 1, 0) > 0)
			answer_line(!nworkers && the_work == W_PIPE);
	}
}

int main(int argc, char **argv)
{
	struct rlimit none = { 0, 0 };

	parse(argc, argv);
	setrlimit(RLIMIT_CORE, &none);
	arena.salt = (uint64_t)getpid(); /* before namespaces, where every victim has pid 1 */
	prepare_signals();
	if (options.namespaces)
		enter_namespaces();
	if (!strcmp(options.work, "all") || !strcmp(options.work, "semtimedop"))
		enter_ipc_namespace();
	if (options.uid >= 0)
		become((unsigned int)options.uid);
	if (options.namespaces) /* here, as another user id forgets it */
		must(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0, "PR_SET_PDEATHSIG");
	make_arena();
	start_workers();
	if (options.spare_fds >= 0)
		fill_fd_table((int)options.spare_fds);
	while (idle_workers()) { /* every thread is where it will be; pages of its own are there */
		if (!nworkers)
			one_round(&alone);
		sleep_ms(1);
	}
	if (options.seccomp)
		install_filter(the_work, !strcmp(options.work, "all"));
	say_ready();
	serve();
}
