/* Operations of program.c on processes, threads, signals and faults of its own. */
#ifndef PROGRAM_LIFE_H
#define PROGRAM_LIFE_H

#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <spawn.h>
#include <sys/ioctl.h>
#include <sys/time.h>
#include <sys/wait.h>

#include "program_io.h"

extern char **environ;
static void child_ops(u64 *digest, struct rng *r, long count);
static u64 whole_digest(void);
static void trace_child(long number);

/* ---- children ---- */

static struct {
	int fd; /* 0: none runs */
	pid_t pid;
} child;

static void reap(u64 *digest)
{
	u64 said_digest = 0;
	int status;

	if (!child.fd)
		return;
	ssize_t got = read(child.fd, &said_digest, sizeof said_digest);
	fold(digest, (u64)got);
	fold(digest, said_digest);
	close(child.fd);
	if (waitpid(child.pid, &status, 0) != child.pid)
		die("waitpid");
	fold(digest, (u64)status);
	child.fd = 0;
}

/* The child works on its copy of everything, while its parent goes on or waits. */
static void op_fork(u64 *digest, struct rng *r)
{
	static long forks;
	struct rng its = { next(r) };
	int ends[2], together = (int)below(r, 2);

	reap(digest);
	forks++;
	if (pipe2(ends, O_CLOEXEC))
		die("pipe");
	pid_t pid = fork();
	if (pid < 0)
		die("fork");
	if (!pid) {
		u64 sum = 1;

		child.fd = 0;
		trace_child(forks);
		open_files(NULL);
		for (int i = 0; i < SLOTS; i++)
			if (slots[i].traits & SHARED) /* its parent writes there meanwhile */
				empty(&slots[i]);
		fold(&sum, whole_digest());
		child_ops(&sum, &its, 1 + below(&its, 40));
		reap(&sum);
		fold(&sum, whole_digest());
		trace_child(0);
		(void)!write(ends[1], &sum, sizeof sum);
		_exit((int)(sum & 63));
	}
	close(ends[1]);
	child.fd = ends[0];
	child.pid = pid;
	if (!together)
		reap(digest);
}

/* What the new program prints, and its exit code. */
static void op_exec(u64 *digest, struct rng *r)
{
	char number[24], *argv[] = { "program-child", "--child", number, NULL };
	int ends[2], status;
	u64 got = 0;
	pid_t pid;

	snprintf(number, sizeof number, "%lu", (unsigned long)next(r) >> 32);
	if (pipe2(ends, O_CLOEXEC))
		die("pipe");
	if (below(r, 2)) {
		posix_spawn_file_actions_t actions;

		posix_spawn_file_actions_init(&actions);
		posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
		if (posix_spawn(&pid, "/proc/self/exe", &actions, NULL, argv, environ))
			die("posix_spawn");
		posix_spawn_file_actions_destroy(&actions);
	} else {
		pid = vfork();
		if (!pid) {
			dup2(ends[1], 1);
			execv("/proc/self/exe", argv);
			_exit(72);
		}
	}
	close(ends[1]);
	fold(digest, (u64)read(ends[0], &got, sizeof got));
	fold(digest, got);
	close(ends[0]);
	if (waitpid(pid, &status, 0) != pid)
		die("waitpid");
	fold(digest, (u64)status);
}

/* ---- signals ---- */

static volatile u64 handled, handler_errors;

/* Runs on whatever stack is set, fills it for a moment, and says whether it kept its content. */
static void on_signal(int number, siginfo_t *info, void *context)
{
	volatile u64 room[96];
	u64 id = (u64)number + (u64)info->si_code;
	int error = errno;

	(void)context;
	for (u64 i = 0; i < 96; i++)
		room[i] = mix(id + i);
	for (u64 i = 0; i < 96; i++)
		handler_errors += room[i] != mix(id + i);
	handled += number != SIGALRM;
	errno = error;
}

static char *timer_stack;
#define TIMER_STACK (32 * PAGE)

static void use_stack(char *at, size_t bytes)
{
	stack_t stack = { .ss_sp = at, .ss_size = bytes };

	if (sigaltstack(&stack, NULL))
		die("sigaltstack");
}

/* Signals taken on a stack that lies in candidates; what they leave there is painted over. */
static void op_signal(u64 *digest, struct rng *r)
{
	struct slot *s = plain_slot(r, NULL);
	sigset_t alarm, before;

	if (!s || s->pages < 16)
		return;
	char *at = s->at + (u64)below(r, s->pages - 15) * PAGE;
	sigemptyset(&alarm);
	sigaddset(&alarm, SIGALRM);
	pthread_sigmask(SIG_BLOCK, &alarm, &before);
	use_stack(at, 16 * PAGE);
	for (int i = 0; i < 3; i++)
		raise(i % 2 ? SIGUSR1 : SIGRTMIN + 3);
	use_stack(timer_stack, TIMER_STACK);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	paint(digest, at, 16, random_id(r), 1);
	fold(digest, handled);
}

/* ---- malloc ---- */

#define BLOCKS 64
static struct { unsigned char *at; size_t size; } blocks[BLOCKS];

static u64 block_errors(int i)
{
	u64 errors = 0;

	for (size_t k = 0; k < blocks[i].size; k += 61)
		errors += blocks[i].at[k] != (unsigned char)(mix((u64)i) + k);
	return errors;
}

static void op_malloc(u64 *digest, struct rng *r)
{
	for (int n = 0; n < 6; n++) {
		int i = (int)below(r, BLOCKS);
		size_t size = (size_t)(below(r, 4) ? 16 + below(r, 9000) : 9000 + below(r, 400000));

		fold(digest, block_errors(i));
		if (!below(r, 4)) {
			free(blocks[i].at);
			blocks[i].at = calloc(size, 1);
			for (size_t k = 0; k < size; k += 509)
				if (blocks[i].at[k])
					fold(digest, k);
		} else {
			blocks[i].at = realloc(blocks[i].at, size);
		}
		if (!blocks[i].at)
			die("malloc");
		blocks[i].size = size;
		for (size_t k = 0; k < size; k++)
			blocks[i].at[k] = (unsigned char)(mix((u64)i) + k);
	}
}

/* ---- page faults of our own ---- */

static int faults = -1; /* our userfaultfd */
static u64 fault_seed;

static void *answer_faults(void *unused)
{
	static u64 page[WORDS] __attribute__((aligned(4096)));
	struct uffd_msg message;

	(void)unused;
	for (;;) {
		struct pollfd one = { .fd = faults, .events = POLLIN };

		if (poll(&one, 1, -1) < 1
		    || read(faults, &message, sizeof message) != sizeof message)
			continue;
		u64 at = message.arg.pagefault.address & ~(PAGE - 1);
		paint_page((char *)page, fault_seed + (at - offset_bytes) / PAGE % 7 * 100 + 1);
		struct uffdio_copy copy = { .dst = at, .src = (u64)(uintptr_t)page, .len = PAGE };
		if (ioctl(faults, UFFDIO_COPY, &copy) && errno != EEXIST && errno != ENOENT)
			die("UFFDIO_COPY");
		if (errno == EEXIST) {
			struct uffdio_range range = { at, PAGE };

			ioctl(faults, UFFDIO_WAKE, &range);
		}
		errno = 0;
	}
	return NULL;
}

static void stop_answering(struct slot *s)
{
	struct uffdio_range range = { (u64)(uintptr_t)s->at, (u64)s->pages * PAGE };

	if (ioctl(faults, UFFDIO_UNREGISTER, &range))
		die("UFFDIO_UNREGISTER");
	s->traits &= ~(unsigned)FAULTED;
}

/* A process is not stopped while it answers faults itself: not for long, or nothing would merge. */
static void end_faults(void)
{
	for (int i = 0; i < SLOTS; i++)
		if (slots[i].traits & FAULTED)
			stop_answering(&slots[i]);
}

/*
 * Always over fresh memory: what README calls "the ranges of a program's own userfaultfd". They
 * become candidates when they are unregistered.
 */
static void op_faults(u64 *digest, struct rng *r)
{
	struct slot *s = any_slot(r);
	struct iovec in;
	int ends[2];

	if (s->traits & FAULTED) {
		stop_answering(s);
		return;
	}
	empty(s);
	s->pages = 16 + below(r, 100);
	map_at(s->at, (size_t)s->pages * PAGE, PROT_READ | PROT_WRITE,
	       MAP_PRIVATE | MAP_ANONYMOUS, -1);
	struct uffdio_register reg = {
		.range = { (u64)(uintptr_t)s->at, (u64)s->pages * PAGE },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	if (ioctl(faults, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");
	s->traits |= FAULTED;
	for (int i = 0; i < 24; i++)
		fold(digest, page_sum(s->at + (u64)below(r, s->pages) * PAGE));
	struct range g = range_of(r, s, 16);
	fold(digest, (u64)said(madvise(g.at, g.bytes, MADV_DONTNEED)));
	/* a fault inside the kernel */
	in = (struct iovec){ s->at + (u64)below(r, s->pages) * PAGE + 9, 64 };
	if (pipe2(ends, O_CLOEXEC))
		die("pipe");
	fold(digest, (u64)write(ends[1], r, 8));
	fold(digest, (u64)said(readv(ends[0], &in, 1)));
	close(ends[0]);
	close(ends[1]);
}

/* ---- threads ---- */

/* A thread's round in memory of its own; maps and unmaps race with everybody else's. */
static void thread_step(u64 *digest, struct rng *r, struct slot *s)
{
	struct range g = range_of(r, s, 64);

	switch (below(r, 9)) {
	case 0:
		fold(digest, (u64)said(madvise(g.at, g.bytes, MADV_DONTNEED)));
		break;
	case 1:
		fold(digest, (u64)said(mprotect(g.at, g.bytes, PROT_READ)));
		fold(digest, page_sum(g.at));
		fold(digest, (u64)said(mprotect(g.at, g.bytes, PROT_READ | PROT_WRITE)));
		break;
	case 2:
		fold(digest, (u64)unmap(g.at, g.bytes));
		map_at(g.at, g.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		break;
	case 3:
		fold(digest, (u64)said(pread(direct_file, g.at, g.bytes,
					     (off_t)below(r, 400) * (off_t)PAGE)));
		break;
	case 4:
	case 5:
		paint(digest, g.at, g.pages, random_id(r), (int)below(r, 2));
		break;
	default:
		for (long p = 0; p < g.pages; p++)
			fold(digest, page_sum(g.at + (u64)p * PAGE));
	}
}

static struct {
	pthread_mutex_t mutex;
	pthread_cond_t go, done;
	long round, steps, running;
	u64 digest[THREADS];
} crew = { .mutex = PTHREAD_MUTEX_INITIALIZER, .go = PTHREAD_COND_INITIALIZER,
	   .done = PTHREAD_COND_INITIALIZER };

static void *work(void *number)
{
	long me = (long)(intptr_t)number, round = 0;
	struct rng r = { mix(0x7eadUL + (u64)me) };

	for (;;) {
		u64 digest = 0;

		pthread_mutex_lock(&crew.mutex);
		while (crew.round == round)
			pthread_cond_wait(&crew.go, &crew.mutex);
		round = crew.round;
		long steps = crew.steps;
		pthread_mutex_unlock(&crew.mutex);
		for (long i = 0; i < steps; i++)
			thread_step(&digest, &r, &own[me]);
		pthread_mutex_lock(&crew.mutex);
		fold(&crew.digest[me], digest);
		if (!--crew.running)
			pthread_cond_signal(&crew.done);
		pthread_mutex_unlock(&crew.mutex);
	}
	return NULL;
}

static void start_crew(void)
{
	sigset_t all, before;
	pthread_t thread;

	sigfillset(&all);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGBUS);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	for (long i = 0; i < THREADS; i++) {
		struct rng r = { (u64)i };
		u64 unused = 0;

		own[i].at = own[i].home;
		own[i].pages = 400;
		map_at(own[i].at, 400 * PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1);
		paint(&unused, own[i].at, 400, random_id(&r), 1);
		if (pthread_create(&thread, NULL, work, (void *)(intptr_t)i))
			die("pthread_create");
	}
	if (pthread_create(&thread, NULL, answer_faults, NULL))
		die("pthread_create");
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void crew_go(long steps)
{
	pthread_mutex_lock(&crew.mutex);
	crew.round++;
	crew.steps = steps;
	crew.running = THREADS;
	pthread_cond_broadcast(&crew.go);
	pthread_mutex_unlock(&crew.mutex);
}

static void crew_wait(u64 *digest)
{
	pthread_mutex_lock(&crew.mutex);
	while (crew.running)
		pthread_cond_wait(&crew.done, &crew.mutex);
	for (int i = 0; i < THREADS; i++)
		fold(digest, crew.digest[i]);
	pthread_mutex_unlock(&crew.mutex);
}

/* A thread that lives for one operation. */
struct errand {
	u64 digest;
	struct rng rng;
};

static void *run_errand(void *argument)
{
	struct errand *errand = argument;

	op_paint(&errand->digest, &errand->rng);
	op_poke(&errand->digest, &errand->rng);
	op_look(&errand->digest, &errand->rng);
	return NULL;
}

static void op_thread(u64 *digest, struct rng *r)
{
	struct errand errand = { .rng = { next(r) } };
	pthread_t thread;
	sigset_t alarm, before;

	sigemptyset(&alarm);
	sigaddset(&alarm, SIGALRM);
	pthread_sigmask(SIG_BLOCK, &alarm, &before);
	if (pthread_create(&thread, NULL, run_errand, &errand))
		die("pthread_create");
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_join(thread, NULL);
	fold(digest, errand.digest);
}

#endif
