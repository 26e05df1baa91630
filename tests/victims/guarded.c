/*
 * A process with merged, guarded memory, which does to it what programs do, and checks what it reads.
 *
 * guarded MODE STORE_FD SOCKET_FD NPAGES ARG
 *
 * STORE_FD: a memfd whose page i is filled with word(i). SOCKET_FD: SOCK_STREAM to the test. Protocol:
 * sends 'g' with the guard context, reads a byte, merges, sends 'm', reads a byte, runs MODE.
 * Prints one line of JSON. A wrong byte anywhere counts as "bad"; it must be 0.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#define GUARD_INSTALL 102
#define GUARD_REMOVE 103
#define PAGE 4096ul
#define WORDS (PAGE / 8)

static char *base;
static long npages, arg;
static int sock;

static void die(const char *what)
{
	fprintf(stderr, "guarded: %s: %s\n", what, strerror(errno));
	exit(2);
}

static uint64_t word(long page) { return 0xA5A5000000000000ul | (uint64_t)page; }

static double now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

static double quantile(double *v, long n, double q)
{
	qsort(v, n, sizeof *v, compare);
	return v[(long)(q * (n - 1))];
}

/* how many words of pages [from, to) at *memory* differ from: the store's, or *fill* */
static long differ(const char *memory, long from, long to, int stored, uint64_t fill)
{
	long bad = 0;
	for (long p = from; p < to; p++) {
		volatile const uint64_t *w = (volatile const uint64_t *)(memory + p * PAGE);
		uint64_t right = stored ? word(p) : fill;
		for (unsigned long i = 0; i < WORDS; i += 73)
			bad += w[i] != right;
		bad += w[WORDS - 1] != right;
	}
	return bad;
}

static long not_store(long from, long to) { return differ(base, from, to, 1, 0); }
static long not_zero(long from, long to) { return differ(base, from, to, 0, 0); }

static void advise(char *memory, long from, long to, int advice)
{
	if (madvise(memory + from * PAGE, (to - from) * PAGE, advice))
		die("madvise");
}

static void drop(long from, long to) { advise(base, from, to, MADV_DONTNEED); }

static char hear(void)
{
	char c = 0;
	if (read(sock, &c, 1) != 1)
		exit(3);
	return c;
}

static void say(char c)
{
	if (write(sock, &c, 1) != 1)
		die("write");
}

static void send_fd(int fd)
{
	char c = 'g', control[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec v = {&c, 1};
	struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = control,
			   .msg_controllen = sizeof control};
	struct cmsghdr *h = CMSG_FIRSTHDR(&m);
	h->cmsg_level = SOL_SOCKET;
	h->cmsg_type = SCM_RIGHTS;
	h->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(h), &fd, sizeof fd);
	if (sendmsg(sock, &m, 0) != 1)
		die("sendmsg");
}

static void merge(int store)
{
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	int guard = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP |
					     UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_MISSING_SHMEM |
					     UFFD_FEATURE_MINOR_SHMEM};
	size_t length = npages * PAGE;
	if (guard < 0 || ioctl(guard, UFFDIO_API, &api))
		die("userfaultfd");
	base = mmap(0, length, PROT_READ | PROT_WRITE, MAP_PRIVATE, store, 0);
	if (base == MAP_FAILED)
		die("mmap");
	send_fd(guard);
	if (write(sock, &base, sizeof base) != sizeof base)
		die("write");
	hear();
	if (madvise(base, length, MADV_POPULATE_READ))
		die("MADV_POPULATE_READ");
	struct uffdio_register reg = {.range = {(uint64_t)base, length},
				      .mode = UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_MISSING};
	if (ioctl(guard, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");
	struct uffdio_continue cont = {.range = {(uint64_t)base, PAGE}, .mode = UFFDIO_CONTINUE_MODE_DONTWAKE};
	/* without this the mapping has no anon_vma, and fork leaves its page table out */
	if (!getenv("GUARDED_NO_CONTINUE") && ioctl(guard, UFFDIO_CONTINUE, &cont) && errno != EEXIST)
		die("UFFDIO_CONTINUE");
	close(guard);
	close(device);
	close(store);
	say('m');
	hear();
}

/* run *look* in a child; what it found bad, or a great number when it died */
static long in_child(long (*look)(void))
{
	int status, pid = fork();
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		long bad = look();
		_exit(bad > 250 ? 250 : bad);
	}
	waitpid(pid, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 100000;
}

/* ---- modes ---- */

static void latency(void)
{
	double *call = calloc(arg, sizeof *call), *touch = calloc(arg, sizeof *touch);
	long bad = 0;
	for (long i = 0; i < arg; i++) {
		double t = now_us();
		drop(0, 64);
		call[i] = now_us() - t;
		t = now_us();
		bad += *(volatile uint64_t *)(base + 5 * PAGE) != 0;
		touch[i] = now_us() - t;
		bad += not_zero(0, 64);
		memset(base, 1, 64 * PAGE);
	}
	bad += not_store(64, npages);
	printf("{\"bad\": %ld, \"madvise_us\": [%.1f, %.1f], \"fault_us\": [%.1f, %.1f]}\n", bad,
	       quantile(call, arg, .5), quantile(call, arg, .99), quantile(touch, arg, .5),
	       quantile(touch, arg, .99));
}

#define CHUNK 16
static atomic_long *turn; /* per chunk: odd = changing, even and not 0 = must read as zeros */
static atomic_int stop;
static atomic_long reads;

static void *reader(void *unused)
{
	long bad = 0, done = 0, c = 0, chunks = npages / CHUNK;
	(void)unused;
	while (!stop) {
		c = (c + 1) % chunks;
		long before = turn[c];
		uint64_t first = *(volatile uint64_t *)(base + (c * CHUNK + done % CHUNK) * PAGE);
		long after = turn[c];
		done++;
		if (before == after && before % 2 == 0)
			bad += before ? first != 0 : first != word(c * CHUNK + (done - 1) % CHUNK);
	}
	reads += done;
	return (void *)bad;
}

static void hammer(void)
{
	pthread_t t[4];
	long bad = 0, chunks = npages / CHUNK, drops = 0;
	turn = calloc(chunks, sizeof *turn);
	for (int i = 0; i < 4; i++)
		pthread_create(&t[i], 0, reader, 0);
	for (long round = 0; round < arg; round++)
		for (long c = 0; c < chunks; c++) {
			turn[c]++;
			if (round)
				memset(base + c * CHUNK * PAGE, 0x77, CHUNK * PAGE);
			drop(c * CHUNK, (c + 1) * CHUNK);
			turn[c]++;
			drops++;
		}
	stop = 1;
	for (int i = 0; i < 4; i++) {
		void *b;
		pthread_join(t[i], &b);
		bad += (long)b;
	}
	printf("{\"bad\": %ld, \"drops\": %ld, \"reads\": %ld}\n", bad, drops, (long)reads);
}

static void *storm_thread(void *quarter)
{
	long n = npages / 4, low = (long)quarter * n, bad = 0;
	unsigned seed = 7 + (long)quarter;
	for (long i = 0; i < arg; i++) {
		long from = low + rand_r(&seed) % n, to = from + 1 + rand_r(&seed) % (low + n - from);
		drop(from, to);
		bad += *(volatile uint64_t *)(base + from * PAGE) != 0;
		bad += *(volatile uint64_t *)(base + (to - 1) * PAGE) != 0;
		*(uint64_t *)(base + from * PAGE) = i;
		bad += *(volatile uint64_t *)(base + from * PAGE) != (uint64_t)i;
	}
	return (void *)bad;
}

static void storm(void)
{
	pthread_t t[4];
	long bad = 0;
	double began = now_us();
	for (long i = 0; i < 4; i++)
		pthread_create(&t[i], 0, storm_thread, (void *)i);
	for (int i = 0; i < 4; i++) {
		void *b;
		pthread_join(t[i], &b);
		bad += (long)b;
	}
	printf("{\"bad\": %ld, \"drops\": %ld, \"us_per_drop\": %.1f}\n", bad, 4 * arg,
	       (now_us() - began) / (4 * arg));
}

static void forks(void)
{
	double *v = calloc(arg, sizeof *v);
	long bad = 0;
	for (long i = 0; i < arg; i++) {
		double t = now_us();
		int status, pid = fork();
		if (!pid)
			_exit(not_store(0, npages) != 0);
		v[i] = now_us() - t;
		waitpid(pid, &status, 0);
		bad += status != 0;
	}
	printf("{\"bad\": %ld, \"fork_us\": [%.0f, %.0f]}\n", bad, quantile(v, arg, .5),
	       quantile(v, arg, .99));
}

static long drop_all(void)
{
	drop(0, npages);
	return not_zero(0, npages);
}

static void drop_in_children(void)
{
	long bad = 0;
	for (long i = 0; i < arg; i++)
		bad += in_child(drop_all) + not_store(0, npages);
	printf("{\"bad\": %ld}\n", bad);
}

static long grandchild(void)
{
	long bad = not_zero(4, 8) + (*(volatile uint64_t *)(base + PAGE) != 5) + not_store(8, npages);
	drop(20, 21);
	return bad + not_zero(20, 21) + not_store(21, npages);
}

static long heir_of_a_drop(void)
{
	return not_zero(40, 44) + not_zero(4, 8) + not_store(8, 40) + not_store(44, npages) + drop_all();
}

static long child(void)
{
	*(uint64_t *)(base + PAGE) = 5;
	drop(4, 8);
	long bad = in_child(grandchild) + not_zero(4, 8) + not_store(8, npages);
	/* dropped and never touched, then inherited */
	drop(40, 44);
	return bad + in_child(heir_of_a_drop) + not_zero(40, 44);
}

static void nest(void)
{
	long bad = 0;
	for (long i = 0; i < arg; i++)
		bad += in_child(child) + not_store(0, npages);
	printf("{\"bad\": %ld}\n", bad);
}

static long after_remap(void) { return not_zero(0, 8) + not_store(8, npages) + drop_all(); }

static void remap(void)
{
	size_t length = npages * PAGE;
	char *to = mmap(0, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *old = base;
	drop(0, 4);
	base = mremap(old, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	if (base != to)
		die("mremap");
	drop(4, 8);
	long bad = in_child(after_remap) + not_zero(0, 8) + not_store(8, npages);
	/* the old range keeps its mapping and must read as zeros */
	to = mmap(0, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	old = base;
	base = mremap(old, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to);
	if (base != to)
		die("mremap DONTUNMAP");
	bad += differ(old, 0, npages, 0, 0) + not_zero(0, 8) + not_store(8, npages);
	/* grow by moving */
	char *grown = mremap(base, length, 2 * length, MREMAP_MAYMOVE);
	if (grown == MAP_FAILED)
		die("mremap grow");
	bad += differ(grown, 8, npages, 1, 0) + differ(grown, npages, 2 * npages, 0, 0);
	printf("{\"bad\": %ld}\n", bad);
}

static long every_third(void)
{
	long bad = 0;
	for (long p = 0; p < npages; p++)
		bad += p % 3 ? not_store(p, p + 1) : not_zero(p, p + 1);
	return bad;
}

static void partial(void)
{
	for (long p = 0; p < npages; p += 3)
		drop(p, p + 1);
	long bad = in_child(every_third) + every_third();
	/* across the border of present and dropped pages, page by page */
	drop(10, 30);
	for (long p = 29; p >= 10; p--)
		bad += not_zero(p, p + 1);
	/* the program writes into a dropped range before its neighbours are read */
	drop(40, 60);
	*(uint64_t *)(base + 45 * PAGE) = 9;
	bad += not_zero(40, 45) + not_zero(46, 60) + (*(volatile uint64_t *)(base + 45 * PAGE) != 9);
	printf("{\"bad\": %ld}\n", bad);
}

static sigjmp_buf fell;
static void on_segv(int unused)
{
	(void)unused;
	siglongjmp(fell, 1);
}

static int segfaults(long page)
{
	signal(SIGSEGV, on_segv);
	if (sigsetjmp(fell, 1))
		return 1;
	*(volatile uint64_t *)(base + page * PAGE);
	return 0;
}

static long guards_hold(void)
{
	return not_zero(8, 12) + !segfaults(20) + !segfaults(21) + !segfaults(513 % npages) +
	       not_store(24, 26);
}

static void guards(void)
{
	if (madvise(base + 8 * PAGE, 4 * PAGE, GUARD_INSTALL)) {
		printf("{\"bad\": 0, \"absent\": 1}\n");
		return;
	}
	advise(base, 8, 12, GUARD_REMOVE); /* never touched before the forks */
	advise(base, 20, 22, GUARD_INSTALL);
	advise(base, 513 % npages, 513 % npages + 1, GUARD_INSTALL);
	long bad = 0;
	for (long i = 0; i < arg; i++)
		bad += in_child(guards_hold);
	bad += guards_hold();
	/* a guard inside a dropped range, whose neighbours are answered in bulk */
	drop(30, 40);
	advise(base, 34, 36, GUARD_INSTALL);
	bad += not_zero(30, 34) + !segfaults(34) + !segfaults(35) + not_zero(36, 40);
	printf("{\"bad\": %ld, \"absent\": 0}\n", bad);
}

/* 'd': dropped; then the test says when to read it, and when to drop more */
static void waits(void)
{
	drop(0, 16);
	say('d');
	hear();
	long bad = not_zero(0, 16);
	drop(16, 32);
	bad += not_zero(16, 32) + not_store(32, npages);
	printf("{\"bad\": %ld}\n", bad);
}

static void *touch(void *unused)
{
	(void)unused;
	return (void *)not_zero(0, 1);
}

/* a fault that the pager has read but not answered: 4 threads wait while it dies */
static void threads_wait(void)
{
	pthread_t t[4];
	long bad = 0;
	drop(0, 16);
	say('d');
	hear();
	for (int i = 0; i < 4; i++)
		pthread_create(&t[i], 0, touch, 0);
	for (int i = 0; i < 4; i++) {
		void *b;
		pthread_join(t[i], &b);
		bad += (long)b;
	}
	bad += not_zero(0, 16) + not_store(16, npages);
	printf("{\"bad\": %ld}\n", bad);
}

/* *arg* children live, wait for a byte each, then drop and look; the parent dropped 8..12 before */
static void families(void)
{
	int down[2], status;
	long bad = 0;
	drop(8, 12);
	if (pipe(down))
		die("pipe");
	for (long i = 0; i < arg; i++)
		if (!fork()) {
			char c;
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			close(down[1]);
			if (read(down[0], &c, 1) != 1)
				_exit(9);
			bad = not_zero(8, 12) + not_store(12, npages);
			drop(20, 30);
			bad += not_zero(20, 30) + not_store(30, npages);
			bad += in_child(drop_all);
			_exit(bad != 0);
		}
	close(down[0]);
	say('d');
	hear();
	for (long i = 0; i < arg; i++)
		if (write(down[1], "x", 1) != 1)
			die("write");
	for (long i = 0; i < arg; i++) {
		wait(&status);
		bad += status != 0;
	}
	say('e');
	hear();
	printf("{\"bad\": %ld}\n", bad);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} modes[] = {
		{"latency", latency}, {"hammer", hammer},     {"storm", storm},
		{"forks", forks},     {"dropall", drop_in_children}, {"nest", nest},
		{"remap", remap},     {"partial", partial},   {"guards", guards},
		{"waits", waits},     {"threads", threads_wait}, {"families", families},
	};
	if (argc != 6)
		return 2;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	sock = atoi(argv[3]);
	npages = atol(argv[4]);
	arg = atol(argv[5]);
	merge(atoi(argv[2]));
	for (unsigned i = 0; i < sizeof modes / sizeof *modes; i++)
		if (!strcmp(modes[i].name, argv[1])) {
			modes[i].run();
			return 0;
		}
	return 2;
}
