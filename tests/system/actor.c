/*
 * A process that does to its own memory what ordinary programs do now and then: it moves it, grows
 * it, changes its protection, gives parts of it away, forks a child that lives on, calls execve, or
 * lets its first thread end before the others. One line on stdin, one on stdout; see actor.py.
 *
 * Arguments: pages, seed, leaderless (0 or 1).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define ROOM (1UL << 30)

static char **arguments;
static volatile uint64_t *arena;
static long pages;
static FILE *in, *out;       /* of this process: the child has pipes */
static FILE *to_child, *from_child;

static void must(int good, const char *what)
{
	if (!good) {
		fprintf(stderr, "actor: %s: %s\n", what, strerror(errno));
		exit(3);
	}
}

static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
	return x ^ x >> 31;
}

static void *reserve(size_t size)
{
	void *p = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	must(p != MAP_FAILED, "reserve");
	return p;
}

/* Nothing lies behind the arena, so that it can grow where it is. */
static void make_arena(long n, uint64_t seed)
{
	char *room = reserve(ROOM);

	must(munmap(room + PAGE, ROOM - PAGE) == 0, "munmap");
	pages = n;
	arena = mmap(room + PAGE, (size_t)n * PAGE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	must(arena != MAP_FAILED, "mmap");
	must(madvise((void *)arena, (size_t)n * PAGE, MADV_NOHUGEPAGE) == 0, "MADV_NOHUGEPAGE");
	for (uint64_t i = 0; i < (uint64_t)n * WORDS; i++)
		arena[i] = mix(mix(seed) + i);
}

static uint64_t sum(long first, long n)
{
	uint64_t total = 0;

	for (uint64_t i = (uint64_t)first * WORDS; i < (uint64_t)(first + n) * WORDS; i++)
		total = total * 0x100000001b3ULL + arena[i];
	return total;
}

static long nonzero(long first, long n)
{
	long found = 0;

	for (uint64_t i = (uint64_t)first * WORDS; i < (uint64_t)(first + n) * WORDS; i++)
		found += arena[i] != 0;
	return found;
}

static void serve(void);

static void do_fork(void)
{
	int there[2], back[2];
	pid_t child;

	must(pipe(there) == 0 && pipe(back) == 0, "pipe");
	must((child = fork()) >= 0, "fork");
	if (!child) {
		must(prctl(PR_SET_PDEATHSIG, 9) == 0, "PR_SET_PDEATHSIG");
		close(there[1]);
		close(back[0]);
		in = fdopen(there[0], "r");
		out = fdopen(back[1], "w");
		serve();
		_exit(0);
	}
	close(there[0]);
	close(back[1]);
	to_child = fdopen(there[1], "w");
	from_child = fdopen(back[0], "r");
	fprintf(out, "ok pid=%d\n", child);
}

/* Pass a line on to the child, and its answer back. */
static void relay(const char *line)
{
	char answer[256];

	fprintf(to_child, "%s\n", line);
	fflush(to_child);
	must(fgets(answer, sizeof(answer), from_child) != NULL, "the child's answer");
	fputs(answer, out);
}

/* How many bytes of a range are mapped, from its beginning on. */
static size_t mapped(char *at, size_t size)
{
	unsigned char held;
	size_t n = 0;

	while (n < size && mincore(at + n, PAGE, &held) == 0)
		n += PAGE;
	return n;
}

static void do_move(void)
{
	size_t size = (size_t)pages * PAGE;
	char *to = reserve(size + 2 * PAGE) + PAGE;

	must(munmap(to, size) == 0, "munmap"); /* so that what is mapped there has been moved */

	void *got = mremap((void *)arena, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to);

	if (got == MAP_FAILED) { /* a part may have moved: it is one mapping's, and goes home */
		int why = errno;
		size_t moved = mapped(to, size);

		must(!moved || mremap(to, moved, moved, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)arena) ==
			       (void *)arena, "to move it back");
		fprintf(out, "ok errno=%d moved=%lu\n", why, moved / PAGE);
		return;
	}
	arena = got;
	fprintf(out, "ok errno=0 address=%#lx\n", (unsigned long)arena);
}

static void do_grow(long n)
{
	size_t size = (size_t)pages * PAGE;
	void *got = mremap((void *)arena, size, size + (size_t)n * PAGE, 0);

	if (got == MAP_FAILED) {
		fprintf(out, "ok errno=%d\n", errno);
		return;
	}
	pages += n;
	fprintf(out, "ok errno=0 bad=%ld\n", nonzero(pages - n, n));
}

/* Register pages with a userfaultfd of its own, and take that back for all that there are. */
static void do_watch(char *at, size_t size)
{
	struct uffdio_range all = { (uintptr_t)arena, (uint64_t)pages * PAGE };
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register registration = {
		.range = { (uintptr_t)at, size }, .mode = UFFDIO_REGISTER_MODE_MISSING
	};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), rc;

	must(fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0, "userfaultfd");
	rc = ioctl(fd, UFFDIO_REGISTER, &registration);
	fprintf(out, "ok errno=%d ", rc ? errno : 0);
	rc = ioctl(fd, UFFDIO_UNREGISTER, &all);
	fprintf(out, "unregister=%d\n", rc ? errno : 0);
	close(fd);
}

static void answer(const char *line)
{
	char name[32] = "";
	long first = 0, n = 1, advice = 0;
	int given = sscanf(line, "%31s %ld %ld %ld", name, &first, &n, &advice);
	char *at = (char *)arena + (size_t)first * PAGE;
	size_t size = (size_t)n * PAGE;

	if (!strncmp(line, "child ", 6))
		relay(line + 6);
	else if (!strcmp(name, "sum"))
		fprintf(out, "ok sum=%#lx\n", given < 2 ? sum(0, pages) : sum(first, n));
	else if (!strcmp(name, "write")) {
		for (long p = first; p < first + n; p++)
			arena[(size_t)p * WORDS + 7] ^= 0x5a5a;
		fprintf(out, "ok\n");
	} else if (!strcmp(name, "dontneed")) {
		int rc = madvise(at, size, MADV_DONTNEED);
		fprintf(out, "ok errno=%d bad=%ld\n", rc ? errno : 0, nonzero(first, n));
	} else if (!strcmp(name, "readonly"))
		fprintf(out, "ok errno=%d\n", mprotect(at, size, PROT_READ) ? errno : 0);
	else if (!strcmp(name, "writable"))
		fprintf(out, "ok errno=%d\n", mprotect(at, size, PROT_READ | PROT_WRITE) ? errno : 0);
	else if (!strcmp(name, "advise")) /* advise PAGE N ADVICE, a number of madvise(2) */
		fprintf(out, "ok errno=%d\n", madvise(at, size, (int)advice) ? errno : 0);
	else if (!strcmp(name, "unmap"))
		fprintf(out, "ok errno=%d\n", munmap(at, size) ? errno : 0);
	else if (!strcmp(name, "map")) { /* fresh memory in their place: zeros */
		void *got = mmap(at, size, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		fprintf(out, "ok errno=%d bad=%ld\n", got == at ? 0 : errno, nonzero(first, n));
	} else if (!strcmp(name, "watch"))
		do_watch(at, size);
	else if (!strcmp(name, "move"))
		do_move();
	else if (!strcmp(name, "grow"))
		do_grow(first);
	else if (!strcmp(name, "fork"))
		do_fork();
	else if (!strcmp(name, "exec")) {
		execv("/proc/self/exe", arguments);
		must(0, "execv");
	} else if (!strcmp(name, "quit"))
		_exit(0);
	else
		fprintf(out, "err no such command\n");
	fflush(out);
}

static void serve(void)
{
	char line[256];

	while (fgets(line, sizeof(line), in)) {
		line[strcspn(line, "\n")] = 0;
		answer(line);
	}
}

static void *other_thread(void *arg)
{
	(void)arg;
	fprintf(out, "ready address=%#lx pages=%ld\n", (unsigned long)arena, pages);
	fflush(out);
	serve();
	_exit(0);
}

int main(int argc, char **argv)
{
	pthread_t thread;

	must(argc == 4, "arguments");
	arguments = argv;
	in = stdin;
	out = stdout;
	make_arena(atol(argv[1]), strtoull(argv[2], NULL, 0));
	if (atoi(argv[3])) {
		must((errno = pthread_create(&thread, NULL, other_thread, NULL)) == 0, "pthread_create");
		syscall(SYS_exit, 0); /* this thread only */
	}
	other_thread(NULL);
}
