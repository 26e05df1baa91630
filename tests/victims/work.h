/*
 * What a victim's threads do while somebody changes the memory under them, and how they notice.
 *
 * Waits: each call has a timeout and must end by it: not before, not by EINTR, not with anything
 * else. compute: registers. write: pages of the thread's own, outside the arena.
 */
#ifndef WORK_H
#define WORK_H

#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "content.h"
#include "registers.h"

#define TIMEOUT_MS 100
#define SPINS 400000
#define OWN_PAGES 4

enum work {
	W_NONE, W_NANOSLEEP, W_EPOLL, W_FUTEX, W_PIPE, W_POLL, W_SIGTIMEDWAIT, W_SEMTIMEDOP, W_RECV,
	W_COMPUTE, W_WRITE, NWORKS
};

/* `slack`: how many milliseconds before its time a timeout may end (those that count jiffies). */
static const struct { const char *name; int slack; } works[NWORKS] = {
	[W_NONE] = { "none", 0 }, [W_NANOSLEEP] = { "nanosleep", 0 }, [W_EPOLL] = { "epoll", 1 },
	[W_FUTEX] = { "futex", 0 }, [W_PIPE] = { "pipe", 0 }, [W_POLL] = { "poll", 1 },
	[W_SIGTIMEDWAIT] = { "sigtimedwait", 0 }, [W_SEMTIMEDOP] = { "semtimedop", 12 },
	[W_RECV] = { "recv", 12 }, [W_COMPUTE] = { "compute", 0 }, [W_WRITE] = { "write", 0 },
};

static struct {
	_Atomic long eintr, early, wrong, registers, writer, arena;
} errors;

struct worker {
	enum work work;
	_Atomic long rounds;
	int epoll, pipe[2], socket[2], sem;
	uint32_t word;
	uint8_t next; /* the next byte the pipe must give */
	volatile uint64_t *own; /* OWN_PAGES pages */
	uint64_t id;
};

static int64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void sleep_ms(long ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000L };

	nanosleep(&t, NULL);
}

static void must(int good, const char *what)
{
	if (!good) {
		fprintf(stderr, "victim: %s: %s\n", what, strerror(errno));
		exit(3);
	}
}

static void prepare_worker(struct worker *w, enum work work, uint64_t id, volatile uint64_t *own)
{
	struct timeval limit = { 0, TIMEOUT_MS * 1000 };
	struct epoll_event event = { .events = EPOLLIN };

	w->work = work;
	w->id = id;
	w->own = own;
	if (work == W_EPOLL || work == W_PIPE || work == W_POLL)
		must(pipe(w->pipe) == 0, "pipe");
	if (work == W_EPOLL) {
		must((w->epoll = epoll_create1(0)) >= 0, "epoll_create1");
		must(epoll_ctl(w->epoll, EPOLL_CTL_ADD, w->pipe[0], &event) == 0, "epoll_ctl");
	} else if (work == W_SEMTIMEDOP) {
		must((w->sem = semget(IPC_PRIVATE, 1, 0600)) >= 0, "semget");
	} else if (work == W_RECV) {
		must(socketpair(AF_UNIX, SOCK_DGRAM, 0, w->socket) == 0, "socketpair");
		must(setsockopt(w->socket[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) == 0,
		     "SO_RCVTIMEO");
	}
}

/* Judge a wait that had to end by its timeout: rc and errno as they were, and when it began. */
static void judge(const struct worker *w, long rc, int error, long want_rc, int want_error,
		  int64_t began)
{
	if (rc == -1 && error == EINTR)
		errors.eintr++;
	else if (rc != want_rc || (rc == -1 && error != want_error))
		errors.wrong++;
	else if (now_ns() - began < (TIMEOUT_MS - works[w->work].slack) * 1000000L)
		errors.early++;
}

static void wait_round(struct worker *w)
{
	struct timespec limit = { 0, TIMEOUT_MS * 1000000L };
	struct pollfd never = { w->pipe[0], POLLIN, 0 };
	struct sembuf down = { 0, -1, 0 };
	struct epoll_event event;
	int64_t began = now_ns();
	sigset_t usr2;
	char byte;
	long rc;

	sigemptyset(&usr2);
	sigaddset(&usr2, SIGUSR2);
	errno = 0;
	switch (w->work) {
	case W_NANOSLEEP:
		rc = nanosleep(&limit, NULL);
		judge(w, rc, errno, 0, 0, began);
		break;
	case W_EPOLL:
		rc = epoll_wait(w->epoll, &event, 1, TIMEOUT_MS);
		judge(w, rc, errno, 0, 0, began);
		break;
	case W_FUTEX:
		rc = syscall(SYS_futex, &w->word, FUTEX_WAIT_PRIVATE, 0, &limit, NULL, 0);
		judge(w, rc, errno, -1, ETIMEDOUT, began);
		break;
	case W_POLL:
		rc = poll(&never, 1, TIMEOUT_MS);
		judge(w, rc, errno, 0, 0, began);
		break;
	case W_SIGTIMEDWAIT:
		rc = sigtimedwait(&usr2, NULL, &limit);
		judge(w, rc, errno, -1, EAGAIN, began);
		break;
	case W_SEMTIMEDOP:
		rc = semtimedop(w->sem, &down, 1, &limit);
		judge(w, rc, errno, -1, EAGAIN, began);
		break;
	case W_RECV:
		rc = recv(w->socket[0], &byte, 1, 0);
		judge(w, rc, errno, -1, EAGAIN, began);
		break;
	case W_PIPE: /* the ticker writes 0, 1, 2, ... */
		rc = read(w->pipe[0], &byte, 1);
		if (rc == -1 && errno == EINTR)
			errors.eintr++;
		else if (rc != 1 || (uint8_t)byte != w->next++)
			errors.wrong++;
		break;
	default:
		break;
	}
}

/* Check what the last round wrote to our own pages, and write anew. */
static void write_round(struct worker *w)
{
	uint64_t last = (uint64_t)w->rounds, key = mix(w->id);
	long bad = 0;

	for (long i = 0; i < (long)(OWN_PAGES * WORDS); i++) {
		bad += last && w->own[i] != mix(key ^ last << 20 ^ (uint64_t)i);
		w->own[i] = mix(key ^ (last + 1) << 20 ^ (uint64_t)i);
	}
	errors.writer += bad;
}

static void one_round(struct worker *w)
{
	if (w->work == W_COMPUTE)
		errors.registers += check_registers((uint64_t)w->rounds + w->id, SPINS);
	else if (w->work == W_WRITE)
		write_round(w);
	else
		wait_round(w);
	w->rounds++;
}

static struct worker *workers;
static int nworkers;

static void *worker_thread(void *arg)
{
	for (;;) {
		one_round(arg);
		if (nworkers > 8) /* two hundred busy threads would starve everybody else */
			sleep_ms(10);
	}
	return NULL;
}

/* Feeds the pipes. It has a round of its own rhythm, so that readers really block. */
static void *ticker_thread(void *arg)
{
	(void)arg;
	for (uint8_t byte = 0;; byte++) {
		sleep_ms(TIMEOUT_MS / 2);
		for (int i = 0; i < nworkers; i++)
			if (workers[i].work == W_PIPE)
				must(write(workers[i].pipe[1], &byte, 1) == 1, "ticker");
	}
	return NULL;
}

#endif
