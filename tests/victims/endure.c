/*
 * A process that does one thing for ever and notices whatever is done to it, for tests that kill
 * the tracer under it. Its first thread does the work, so it is the thread that a window borrows.
 *
 * endure CTLFD MODE PAGES: the arena, of PAGES pages at ARENA, holds word(p, k). CTLFD is shared
 * memory of 64-bit words: rounds, wrong results, calls that ended by EINTR, the latest end of a
 * wait after its timeout (microseconds), and what was wrong last.
 *
 * MODE: compute | tiles | nanosleep | epoll | futex | pipe | poll | storm | churn | write | drop | fork.
 * tiles: AMX tile registers, which threads get room for when they first use them; compute where there
 * are none. storm: signals every 200 us, taken on the ordinary stack. churn: malloc, realloc, mmap, munmap.
 * write: three threads write to the arena. drop: three threads drop pages of it and refill them. fork:
 * children look at the arena, write to it and drop pages of it. All others look at the arena meanwhile.
 */
#include <errno.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "registers.h"

#define PAGE 4096UL
#define WORDS 512
#define ARENA 0x510000000000UL
#define TIMEOUT_MS 20

enum { ROUNDS, WRONG, EINTRS, LATEST_US, LAST, READY };

static _Atomic uint64_t *ctl;
static long pages;

static void must(int good, const char *what)
{
	if (!good) {
		fprintf(stderr, "endure: %s: %s\n", what, strerror(errno));
		_exit(3);
	}
}

static void wrong(uint64_t what)
{
	ctl[WRONG]++;
	ctl[LAST] = what;
}

static uint64_t word(long page, int k)
{
	return 0xA000000000000000UL + (uint64_t)page * WORDS + (uint64_t)k;
}

static volatile uint64_t *word_at(long page, int k)
{
	return (volatile uint64_t *)(ARENA + (uint64_t)page * PAGE) + k;
}

static void fill(long page)
{
	for (int k = 0; k < WORDS; k++)
		*word_at(page, k) = word(page, k);
}

static int64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000L + t.tv_nsec / 1000;
}

/* A wait that had to end by its timeout: not early, not by anything else. */
static void judge(int good, int64_t began, int slack_us)
{
	int64_t late = now_us() - began - TIMEOUT_MS * 1000;

	if (!good && errno == EINTR)
		ctl[EINTRS]++;
	else if (!good)
		wrong(1000 + (uint64_t)errno);
	else if (late < -slack_us)
		wrong(2000);
	if (late > (int64_t)ctl[LATEST_US])
		ctl[LATEST_US] = (uint64_t)late;
}

static int epoll_fd, pipe_fds[2];
static volatile sig_atomic_t taken;

static void on_alarm(int number)
{
	volatile char frame[256]; /* a handler that uses its stack */

	memset((void *)frame, number, sizeof(frame));
	taken++;
}

static void *ticker(void *arg)
{
	(void)arg;
	for (uint8_t byte = 0;; byte++) {
		struct timespec t = { 0, 3000000 };

		while (nanosleep(&t, &t) < 0)
			ctl[EINTRS] += errno == EINTR;
		must(write(pipe_fds[1], &byte, 1) == 1, "write");
	}
	return NULL;
}

static uint64_t next(uint64_t *state)
{
	*state = *state * 6364136223846793005UL + 1442695040888963407UL;
	return *state >> 33;
}

static void do_compute(uint64_t round)
{
	if (check_registers(round, 20000))
		wrong(3000);
}

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18
#define TILE 1024

static int has_tiles(void)
{
	return __builtin_cpu_supports("amx-tile") &&
	       !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

__attribute__((target("amx-tile"))) static void do_tiles(uint64_t round)
{
	static const struct {
		uint8_t palette, start_row, reserved[14];
		uint16_t bytes[16];
		uint8_t rows[16];
	} configuration = { .palette = 1, .bytes = { 64, 64 }, .rows = { 16, 16 } };
	static uint8_t in[TILE], out[TILE];

	for (int i = 0; i < TILE; i++)
		in[i] = (uint8_t)(round * 131 + (uint64_t)i * 29 + 1);
	_tile_loadconfig(&configuration);
	_tile_loadd(0, in, 64);
	_tile_loadd(1, in, 64);
	for (volatile int spin = 0; spin < 20000; spin++)
		;
	_tile_stored(1, out, 64);
	if (memcmp(in, out, TILE))
		wrong(3100);
	if (round % 2)
		_tile_release();
}

static void do_wait(const char *mode)
{
	struct timespec limit = { 0, TIMEOUT_MS * 1000000L };
	static uint32_t futex_word;
	static uint8_t expected_byte;
	struct epoll_event event;
	int64_t began = now_us();
	uint8_t byte;

	if (!strcmp(mode, "nanosleep"))
		judge(nanosleep(&limit, NULL) == 0, began, 0);
	else if (!strcmp(mode, "epoll"))
		judge(epoll_wait(epoll_fd, &event, 1, TIMEOUT_MS) == 0, began, 1000);
	else if (!strcmp(mode, "poll"))
		judge(poll(NULL, 0, TIMEOUT_MS) == 0, began, 1000);
	else if (!strcmp(mode, "futex"))
		judge(syscall(SYS_futex, &futex_word, FUTEX_WAIT_PRIVATE, 0, &limit, NULL, 0) == -1 &&
		      errno == ETIMEDOUT, began, 0);
	else if (read(pipe_fds[0], &byte, 1) != 1) {
		errno == EINTR ? (void)ctl[EINTRS]++ : wrong(1000 + (uint64_t)errno);
	} else if (byte != expected_byte++)
		wrong(4000);
}

/* Half of the time in a handler, half in computing, now and then in pause(2). */
static void do_storm(uint64_t round)
{
	sigset_t mask;
	sig_atomic_t before = taken;

	if (check_registers(round, 2000))
		wrong(3000);
	if (round % 8 == 0 && (pause() != -1 || errno != EINTR || taken == before))
		wrong(5000);
	must(sigprocmask(SIG_SETMASK, NULL, &mask) == 0, "sigprocmask");
	if (sigismember(&mask, SIGALRM) || !sigismember(&mask, SIGUSR2) || sigismember(&mask, SIGTERM))
		wrong(5001);
}

#define BLOCKS 64
static void do_churn(uint64_t *state)
{
	static struct { uint64_t *at; size_t words; uint64_t key; } blocks[BLOCKS];

	for (int i = 0; i < 50; i++) {
		int slot = (int)(next(state) % BLOCKS);
		size_t words = 1 + next(state) % (next(state) % 16 ? 500 : 60000), old = blocks[slot].words;
		uint64_t *at = blocks[slot].at, key = blocks[slot].key;

		for (size_t k = 0; k < old; k += 61)
			if (at[k] != key + k)
				wrong(6000);
		if (old && next(state) % 2) {
			at = realloc(at, words * 8);
			must(at != NULL, "realloc");
			for (size_t k = 0; k < words && k < old; k += 61)
				if (at[k] != key + k)
					wrong(6001);
		} else {
			free(at);
			at = malloc(words * 8);
			must(at != NULL, "malloc");
		}
		key = next(state) << 20;
		for (size_t k = 0; k < words; k += 61)
			at[k] = key + k;
		blocks[slot].at = at;
		blocks[slot].words = words;
		blocks[slot].key = key;
	}
	uint64_t *fresh = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(fresh != MAP_FAILED, "mmap");
	if (fresh[0] || fresh[3 * WORDS])
		wrong(6002);
	fresh[WORDS] = 1;
	must(munmap(fresh, 4 * PAGE) == 0, "munmap");
}

static void write_round(uint64_t *state, int actor)
{
	long page = (long)(next(state) % (uint64_t)pages);
	volatile uint64_t *w = word_at(page, 8 + actor);
	uint64_t was = word(page, 8 + actor);

	if (*w != was)
		wrong(7000);
	*w = *state;
	if (*w != *state)
		wrong(7001);
	*w = was;
	if (*w != was)
		wrong(7002);
}

/* Page p belongs to the thread p % 3. */
static void drop_round(uint64_t *state, int actor)
{
	long page = (long)(next(state) % (uint64_t)(pages / 3)) * 3 + actor;

	for (int k = 0; k < WORDS; k += 73)
		if (*word_at(page, k) != word(page, k))
			wrong(8000);
	must(madvise((void *)word_at(page, 0), PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
	for (int k = 0; k < WORDS; k += 73)
		if (*word_at(page, k))
			wrong(8001);
	fill(page);
}

static void look(uint64_t *state)
{
	for (int i = 0; i < 8; i++) {
		long page = (long)(next(state) % (uint64_t)pages);
		int k = (int)(next(state) % WORDS);

		if (*word_at(page, k) != word(page, k))
			wrong(9000);
	}
}

/* What a child does to its arena must be seen by it alone; it lasts some milliseconds. */
static void child_life(uint64_t *state)
{
	struct timespec t = { 0, (long)(next(state) % 3000000) };
	long page = (long)(next(state) % (uint64_t)(pages - 8));

	look(state);
	*word_at(page, 3) = 1;
	nanosleep(&t, NULL);
	if (*word_at(page, 3) != 1 || *word_at(page, 4) != word(page, 4))
		wrong(9100);
	must(madvise((void *)word_at(page, 0), 8 * PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
	for (int k = 0; k < 8 * WORDS; k += 73)
		if (word_at(page, 0)[k])
			wrong(9101);
	for (int i = 0; i < 8; i++)
		fill(page + i);
	look(state);
}

static void do_fork(uint64_t *state)
{
	int status;
	pid_t child = fork();

	must(child >= 0, "fork");
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		child_life(state);
		_exit(0);
	}
	while (waitpid(child, &status, 0) < 0)
		errno == EINTR ? (void)ctl[EINTRS]++ : wrong(1000 + (uint64_t)errno);
	if (status)
		wrong(9200 + (uint64_t)status);
	next(state);
}

static void (*crew_round)(uint64_t *state, int actor);

static void *crew(void *arg)
{
	int actor = (int)(intptr_t)arg;
	uint64_t state = (uint64_t)actor + 3;

	for (;;) {
		crew_round(&state, actor);
		if (next(&state) % 8 == 0)
			usleep(50);
		ctl[ROUNDS]++;
	}
	return NULL;
}

static void prepare(const char *mode)
{
	struct itimerval often = { { 0, 200 }, { 0, 200 } };
	struct sigaction action = { .sa_handler = on_alarm };
	pthread_t thread;
	sigset_t usr2;

	sigemptyset(&usr2);
	sigaddset(&usr2, SIGUSR2);
	must(sigprocmask(SIG_BLOCK, &usr2, NULL) == 0, "sigprocmask");
	must((epoll_fd = epoll_create1(0)) >= 0 && pipe(pipe_fds) == 0, "epoll_create1, pipe");
	if (!strcmp(mode, "pipe"))
		must(pthread_create(&thread, NULL, ticker, NULL) == 0, "pthread_create");
	if (!strcmp(mode, "storm")) {
		must(sigaction(SIGALRM, &action, NULL) == 0, "sigaction");
		must(setitimer(ITIMER_REAL, &often, NULL) == 0, "setitimer");
	}
	crew_round = !strcmp(mode, "write") ? write_round : !strcmp(mode, "drop") ? drop_round : NULL;
	for (intptr_t actor = 1; crew_round && actor < 3; actor++)
		must(pthread_create(&thread, NULL, crew, (void *)actor) == 0, "pthread_create");
}

int main(int argc, char **argv)
{
	uint64_t state = 1;

	must(argc == 4, "arguments");
	const char *mode = argv[2];

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	pages = atol(argv[3]);
	ctl = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[1]), 0);
	must(ctl != MAP_FAILED, "the control block");
	must(mmap((void *)ARENA, (size_t)pages * PAGE, PROT_READ | PROT_WRITE,
		  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == (void *)ARENA, "mmap");
	must(madvise((void *)ARENA, (size_t)pages * PAGE, MADV_NOHUGEPAGE) == 0, "MADV_NOHUGEPAGE");
	for (long page = 0; page < pages; page++)
		fill(page);
	prepare(mode);
	const int tiles = has_tiles();

	ctl[READY] = 1;
	if (crew_round)
		crew((void *)0);
	for (uint64_t round = 1;; round++) {
		if (!strcmp(mode, "compute")) do_compute(round);
		else if (!strcmp(mode, "tiles")) tiles ? do_tiles(round) : do_compute(round);
		else if (!strcmp(mode, "storm")) do_storm(round);
		else if (!strcmp(mode, "churn")) do_churn(&state);
		else if (!strcmp(mode, "fork")) do_fork(&state);
		else do_wait(mode);
		look(&state);
		ctl[ROUNDS]++;
	}
}
