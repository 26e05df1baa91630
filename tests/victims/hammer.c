/*
 * A process whose memory everybody writes to at once, and that reads every write back.
 *
 * hammer CTLFD PAGES ACTORS [FILE]: the arena lies at ARENA and page p holds base(p, k) in word k.
 * Each actor owns one word of every page (or whole pages), so that whatever it finds there is its
 * own doing: it sees the base value, writes another, reads it back, puts the base value back and
 * reads it back. A window that loses, repeats or tears a write shows. ACTORS is a set of letters:
 *
 *   w  two threads that write              d  a thread that drops pages and fills them again
 *   v  a process: process_vm_writev        m  a process: /proc/PID/mem
 *   r  a process that reads by process_vm_readv
 *   f  a thread that forks; children verify, drop, verify
 *   a  a thread that reads FILE with O_DIRECT by libaio into the arena
 *   u  a thread that reads FILE by io_uring into registered buffers of the arena
 *
 * CTLFD is shared memory of 64-bit words, see enum below; actors work where the cursor points.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS 512
#define ARENA 0x510000000000UL
#define FILE_BLOCKS 64

/* words of the control block; NACTORS counters begin at each of DONE, LOST, INSIDE, FAILED */
enum { QUIT, READY, CURSOR, WIDTH, RESET, GATE, DONE = 16, LOST = 32, INSIDE = 48, FAILED = 64 };
enum { W0, W1, VMWRITE, MEMWRITE, VMREAD, DROP, FORK, AIO, URING, NACTORS };

static _Atomic uint64_t *ctl;
static long pages;
static pid_t victim;
static const char *file;

static void must(int good, const char *what)
{
	if (!good) {
		fprintf(stderr, "hammer: %s: %s\n", what, strerror(errno));
		_exit(3);
	}
}

static uint64_t base(long page, int word)
{
	return 0xA000000000000000UL + (uint64_t)page * WORDS + (uint64_t)word;
}

static volatile uint64_t *word_at(long page, int word)
{
	return (volatile uint64_t *)(ARENA + (uint64_t)page * PAGE) + word;
}

static void fill(long page)
{
	for (int k = 0; k < WORDS; k++)
		*word_at(page, k) = base(page, k);
}

static void pause_us(long us)
{
	struct timespec t = { 0, us * 1000 };

	nanosleep(&t, NULL);
}

/* Pages 13, 14 and 15 of each 16 belong to one actor alone. */
static int of_all(long page) { return page % 16 < 13; }

static uint64_t next(uint64_t *state)
{
	*state = *state * 6364136223846793005UL + 1442695040888963407UL;
	return *state >> 33;
}

/* A page near the cursor; `own` names the actor's page of 16, -1 for those of all. */
static long choose(uint64_t *state, int own)
{
	long first = (long)ctl[CURSOR], width = (long)ctl[WIDTH], page;

	do {
		page = first + (long)(next(state) % (uint64_t)width);
		if (own >= 0)
			page = page / 16 * 16 + own;
	} while ((own < 0 && !of_all(page)) || page >= pages);
	return page;
}

/* A run that is being made anew is nobody's: go in, or stay out. */
static int enter(int actor)
{
	ctl[INSIDE + actor] = 1;
	if (!ctl[GATE])
		return 1;
	ctl[INSIDE + actor] = 0;
	pause_us(20);
	return 0;
}

static void leave(int actor) { ctl[INSIDE + actor] = 0; }

static void expect(int actor, int good)
{
	if (!good)
		ctl[LOST + actor]++;
}

static void *writer(void *arg)
{
	int actor = (int)(intptr_t)arg;
	uint64_t state = (uint64_t)actor + 1;

	while (!ctl[QUIT]) {
		if (!enter(actor))
			continue;
		long page = choose(&state, -1);
		volatile uint64_t *w = word_at(page, 8 + actor);
		uint64_t was = base(page, 8 + actor), other = next(&state) << 8 | 7;

		expect(actor, *w == was);
		*w = other;
		expect(actor, *w == other);
		*w = was;
		expect(actor, *w == was);
		ctl[DONE + actor] += 2;
		leave(actor);
		if (next(&state) % 4 == 0)
			pause_us(30);
	}
	return NULL;
}

/* Pages of its own: dropped they read as zeros, filled they hold what was filled in. */
static void *dropper(void *arg)
{
	uint64_t state = 77;

	(void)arg;
	while (!ctl[QUIT]) {
		if (!enter(DROP))
			continue;
		long page = choose(&state, 13);

		for (int k = 0; k < WORDS; k += 73)
			expect(DROP, *word_at(page, k) == base(page, k));
		must(madvise((void *)word_at(page, 0), PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
		if (next(&state) % 2)
			pause_us(100); /* let a window come while it is dropped */
		for (int k = 0; k < WORDS; k += 73)
			expect(DROP, *word_at(page, k) == 0);
		fill(page);
		ctl[DONE + DROP]++;
		leave(DROP);
		pause_us(50);
	}
	return NULL;
}

static long child_bad(long first, long width)
{
	long bad = 0;

	for (long page = first; page < first + width; page++)
		for (int k = 17; k < WORDS / 2; k += 55)
			bad += of_all(page) && *word_at(page, k) != base(page, k);
	madvise((void *)word_at(first, 0), (size_t)width * PAGE, MADV_DONTNEED);
	for (long page = first; page < first + width; page++)
		for (int k = 0; k < WORDS; k += 55)
			bad += *word_at(page, k) != 0;
	return bad;
}

static void *forker(void *arg)
{
	(void)arg;
	while (!ctl[QUIT]) {
		pause_us(20000);
		if (!enter(FORK))
			continue;
		long first = (long)ctl[CURSOR], width = (long)ctl[WIDTH];
		int status;
		pid_t child = fork();

		must(child >= 0, "fork");
		if (!child)
			_exit(child_bad(first, width) ? 1 : 0);
		leave(FORK);
		while (waitpid(child, &status, 0) < 0)
			must(errno == EINTR, "waitpid");
		expect(FORK, WIFEXITED(status) && WEXITSTATUS(status) == 0);
		ctl[DONE + FORK]++;
	}
	return NULL;
}

#include "hammer_io.h"
#include "foreign.h"

static void start(void *(*body)(void *), int actor)
{
	pthread_t thread;

	must((errno = pthread_create(&thread, NULL, body, (void *)(intptr_t)actor)) == 0, "pthread");
}

/* Make the cursor's run anonymous memory again, but for the pages that I/O may be on its way to. */
static void make_anew(void)
{
	long first = (long)ctl[CURSOR], width = (long)ctl[WIDTH];

	ctl[GATE] = 1;
	for (int actor = 0; actor < NACTORS; actor++)
		while (ctl[INSIDE + actor])
			pause_us(10);
	for (long page = first; page < first + width; page += 16) {
		void *at = (void *)word_at(page, 0);

		must(mmap(at, 14 * PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at, "mmap");
		must(madvise(at, 14 * PAGE, MADV_NOHUGEPAGE) == 0, "MADV_NOHUGEPAGE");
		for (long p = page; p < page + 14; p++)
			fill(p);
	}
	ctl[GATE] = 0;
	ctl[RESET] = 0;
}

int main(int argc, char **argv)
{
	must(argc >= 4, "arguments");
	const char *actors = argv[3];
	size_t size;

	pages = atol(argv[2]);
	size = (size_t)pages * PAGE;
	file = argc > 4 ? argv[4] : NULL;
	victim = getpid();
	ctl = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[1]), 0);
	must(ctl != MAP_FAILED, "the control block");
	must(mmap((void *)ARENA, size, PROT_READ | PROT_WRITE,
		  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == (void *)ARENA, "mmap");
	must(madvise((void *)ARENA, size, MADV_NOHUGEPAGE) == 0, "MADV_NOHUGEPAGE");
	start_foreigners(actors); /* before the arena has pages: fork would share them */
	for (long page = 0; page < pages; page++)
		fill(page);
	if (strchr(actors, 'w')) {
		start(writer, W0);
		start(writer, W1);
	}
	if (strchr(actors, 'd')) start(dropper, DROP);
	if (strchr(actors, 'f')) start(forker, FORK);
	if (strchr(actors, 'a')) start(aio_reader, AIO);
	if (strchr(actors, 'u')) start(uring_reader, URING);
	ctl[READY] = 1;
	while (!ctl[QUIT]) {
		if (ctl[RESET])
			make_anew();
		pause_us(100);
	}
	pause(); /* until we are killed: the arena is looked at from outside */
}
