/*
 * Programs that a stop is hard on. stops MODE: prints "ready ..." and then obeys lines on stdin.
 *
 * rseq      threads, the first one too, count in per-CPU counters by restartable sequences. After
 *           SIGUSR1: how many increments were made, and how many the counters hold. Both are equal,
 *           or a sequence was cut.
 * myrseq    the first thread registers an rseq area in page 9 of the arena when told "register"
 *           ("myrseq alone": there is no other thread); other lines: what the kernel wrote there.
 * vfork MS  as often as possible: vfork, and the child sleeps MS milliseconds.
 * disk      a thread waits in state D (a system call's copy from memory of a userfaultfd).
 * leader    the first thread has ended; another one works.
 * sharer    a second process shares the memory (CLONE_VM without CLONE_THREAD); prints its pid.
 * queue N   SIGUSR2 blocked; "go": signals RTMIN with payloads are taken from handlers and counted.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/rseq.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define ARENA 0x510000000000UL
#define ARENA_PAGES 64
#define CPUS 256

static void must(int good, const char *what)
{
	if (!good) {
		fprintf(stderr, "stops: %s: %s\n", what, strerror(errno));
		_exit(3);
	}
}

static void say(const char *text)
{
	must(write(1, text, strlen(text)) == (ssize_t)strlen(text), "write");
}

/* One line from stdin; the end of stdin is our end. */
static const char *listen_for(void)
{
	static char line[64];
	size_t used = 0;

	for (;;) {
		ssize_t got = read(0, line + used, 1);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			_exit(0);
		if (line[used] == '\n' || used == sizeof(line) - 2) {
			line[used] = 0;
			return line;
		}
		used++;
	}
}

static void start(void *(*body)(void *))
{
	pthread_t thread;

	must((errno = pthread_create(&thread, NULL, body, NULL)) == 0, "pthread_create");
}

static uint64_t word(long page, int k) { return 0xA000000000000000UL + (uint64_t)page * 512 + (uint64_t)k; }

static void make_arena(void)
{
	uint64_t *at = mmap((void *)ARENA, ARENA_PAGES * PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	must(at == (void *)ARENA, "mmap");
	must(madvise(at, ARENA_PAGES * PAGE, MADV_NOHUGEPAGE) == 0, "MADV_NOHUGEPAGE");
	for (long page = 0; page < ARENA_PAGES; page++)
		for (int k = 0; k < 512; k++)
			at[page * 512 + k] = word(page, k);
}

#include "sequences.h"

/* ---- threads that do not stop */

static long vfork_ms;
static _Atomic long vforks;

static void *vforker(void *arg)
{
	struct timespec t = { vfork_ms / 1000, vfork_ms % 1000 * 1000000L };
	int status;

	for (;;) {
		pid_t child = vfork();
		must(child >= 0, "vfork");
		if (!child) {
			syscall(SYS_nanosleep, &t, NULL);
			_exit(7);
		}
		while (waitpid(child, &status, 0) < 0)
			must(errno == EINTR, "waitpid");
		must(WIFEXITED(status) && WEXITSTATUS(status) == 7, "the child's status");
		vforks++;
		usleep(500);
	}
	return arg;
}

static void *waits_in_kernel(void *arg)
{
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = { .api = UFFD_API };
	void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uffdio_register reg = {
		.range = { (uint64_t)page, PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int fds[2];

	must(uffd >= 0 && ioctl(uffd, UFFDIO_API, &api) == 0, "userfaultfd");
	must(ioctl(uffd, UFFDIO_REGISTER, &reg) == 0 && pipe(fds) == 0, "UFFDIO_REGISTER");
	vforks = 1;
	must(write(fds[1], page, 8) == -1, "nobody answers"); /* never comes back */
	return arg;
}

static void report_vforks(void)
{
	char text[64];

	for (;;) {
		listen_for();
		snprintf(text, sizeof(text), "vforks %ld\n", (long)vforks);
		say(text);
	}
}

static void *serve(void *arg)
{
	usleep(20000); /* the first thread is gone by then */
	say("ready\n");
	for (;;) {
		listen_for();
		uint64_t bad = 0;
		for (long i = 0; i < ARENA_PAGES * 512; i++)
			bad += ((volatile uint64_t *)ARENA)[i] != word(i / 512, (int)(i % 512));
		say(bad ? "wrong\n" : "right\n");
	}
	return arg;
}

static int sleep_and_share(void *arg)
{
	(void)arg;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	while (pause() < 0)
		;
	return 0;
}

static void share(void)
{
	static char stack[65536] __attribute__((aligned(16)));
	pid_t other = clone(sleep_and_share, stack + sizeof(stack), CLONE_VM | SIGCHLD, NULL);
	char text[64];

	must(other > 0, "clone");
	snprintf(text, sizeof(text), "ready %d\n", other);
	say(text);
	for (;;)
		listen_for();
}

/* ---- signals */

static _Atomic long received, disorder;
static long expected_value;

static void on_queued(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	disorder += info->si_code != SI_QUEUE || info->si_value.sival_int != expected_value;
	expected_value = info->si_value.sival_int + 1;
	received++;
}

/* RTMIN is caught; SIGURG, SIGWINCH and SIGTRAP are as the mode says; all are looked at by /proc. */
static void do_queue(const char *dispositions)
{
	struct sigaction action = { .sa_sigaction = on_queued, .sa_flags = SA_SIGINFO };
	const int numbers[3] = { SIGTRAP, SIGURG, SIGWINCH };
	sigset_t blocked;
	char text[128];

	must(sigaction(SIGRTMIN, &action, NULL) == 0, "sigaction");
	sigemptyset(&blocked);
	for (int i = 0; i < 3 && dispositions[i]; i++) {
		if (dispositions[i] == 'i')
			signal(numbers[i], SIG_IGN);
		else if (dispositions[i] == 'b')
			sigaddset(&blocked, numbers[i]);
		else if (dispositions[i] == 'c')
			must(sigaction(numbers[i], &action, NULL) == 0, "sigaction");
	}
	sigprocmask(SIG_BLOCK, &blocked, NULL);
	say("ready\n");
	for (;;) {
		const char *line = listen_for();
		struct timespec none = { 0, 0 };
		siginfo_t info;

		if (!strncmp(line, "take ", 5)) { /* a blocked signal, if it waits */
			sigset_t set;
			sigemptyset(&set);
			sigaddset(&set, atoi(line + 5));
			int got = sigtimedwait(&set, &info, &none);
			snprintf(text, sizeof(text), "took %d\n", got);
		} else {
			snprintf(text, sizeof(text), "received %ld disorder %ld\n", (long)received, (long)disorder);
		}
		say(text);
	}
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "", *argument = argc > 2 ? argv[2] : "";

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	make_arena();
	if (!strcmp(mode, "rseq")) {
		do_rseq();
	} else if (!strcmp(mode, "myrseq")) {
		do_myrseq(!strcmp(argument, "alone"));
	} else if (!strcmp(mode, "vfork")) {
		vfork_ms = atol(argument);
		start(vforker);
		say("ready\n");
		report_vforks();
	} else if (!strcmp(mode, "disk")) {
		start(waits_in_kernel);
		while (!vforks)
			usleep(1000);
		usleep(20000);
		say("ready\n");
		report_vforks();
	} else if (!strcmp(mode, "leader")) {
		start(serve);
		pthread_exit(NULL);
	} else if (!strcmp(mode, "sharer")) {
		share();
	} else if (!strcmp(mode, "queue")) {
		do_queue(argument);
	}
	return 2;
}
