/* Operations of program.c that let the kernel read and write candidates: pipes, files, itself. */
#ifndef PROGRAM_IO_H
#define PROGRAM_IO_H

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "program_mm.h"

#define FILE_PAGES 512
#define IOVS 4

static int scratch_file = -1, direct_file = -1, self_mem = -1;

/* A file of the process's own: a child must not write where its parent does. */
static void open_files(const char *directory)
{
	static char path[256];
	static u64 page[WORDS] __attribute__((aligned(4096)));

	if (scratch_file >= 0) {
		close(scratch_file);
		close(self_mem);
	}
	scratch_file = memfd_create("program", MFD_CLOEXEC);
	self_mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	if (scratch_file < 0 || self_mem < 0 || ftruncate(scratch_file, FILE_PAGES * PAGE))
		die("files");
	if (!directory)
		return;
	snprintf(path, sizeof path, "%s/direct.%d", directory, (int)getpid());
	direct_file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	for (u64 p = 0; p < FILE_PAGES; p++) {
		paint_page((char *)page, 1 + p % 40 * 100);
		if (write(direct_file, page, PAGE) != (ssize_t)PAGE)
			die("direct file");
	}
	fsync(direct_file);
	close(direct_file);
	direct_file = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	if (direct_file < 0)
		die("O_DIRECT");
	unlink(path);
}

/* Up to four pieces of different slots, not aligned to anything. */
static int pieces(struct rng *r, struct iovec *iov, size_t most)
{
	int n = 1 + (int)below(r, IOVS);

	for (int i = 0; i < n; i++) {
		struct slot *s = any_slot(r);

		if (!s->pages) {
			iov[i] = (struct iovec){ s->home, 0 };
			continue;
		}
		struct range g = range_of(r, s, MOST - 1);
		size_t skip = (size_t)below(r, 3) * 712, length = 1 + (size_t)below(r, (long)most);
		if (skip + length > g.bytes)
			length = g.bytes - skip;
		iov[i] = (struct iovec){ g.at + skip, length };
	}
	return n;
}

/*
 * Whether the kernel would copy pages onto themselves. What a program gets then was never defined: a
 * page that is pinned or spliced and written at once may be read before or after, merged or not.
 */
static int overlap(const struct iovec *a, int na, const struct iovec *b, int nb)
{
	for (int i = 0; i < na; i++)
		for (int j = 0; j < nb; j++) {
			u64 x = (u64)a[i].iov_base & ~(PAGE - 1), y = (u64)b[j].iov_base & ~(PAGE - 1);

			if (x < (u64)b[j].iov_base + b[j].iov_len && y < (u64)a[i].iov_base + a[i].iov_len)
				return 1;
		}
	return 0;
}

static void op_pipe(u64 *digest, struct rng *r)
{
	struct iovec out[IOVS], in[IOVS];
	int ends[2], socket_pair = !below(r, 3), splice_in = !socket_pair && !below(r, 3);
	int nout = pieces(r, out, 12000), nin = pieces(r, in, 12000);

	splice_in = splice_in && !overlap(out, nout, in, nin);
	/* what is sent is at most 48 KB and fits in at once; neither end ever waits */
	if (socket_pair ? socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends)
			: pipe2(ends, O_NONBLOCK | O_CLOEXEC))
		die("pipe");
	int from = ends[0], to = ends[1];
	fold(digest, (u64)said(splice_in ? vmsplice(to, out, (size_t)nout, 0)
					 : writev(to, out, nout)));
	for (int i = 0; i < 8; i++) {
		long got = said(readv(from, in, nin));

		fold(digest, (u64)got);
		if (got <= 0)
			break;
	}
	close(from);
	close(to);
}

static void op_file(u64 *digest, struct rng *r)
{
	struct iovec out[IOVS], in[IOVS];
	int nout = pieces(r, out, 40000), nin = pieces(r, in, 40000);
	off_t at = (off_t)below(r, (FILE_PAGES - 64) * (long)PAGE);

	fold(digest, (u64)said(pwritev(scratch_file, out, nout, at)));
	at = (off_t)below(r, (FILE_PAGES - 64) * (long)PAGE);
	fold(digest, (u64)said(preadv(scratch_file, in, nin, at)));
}

static void op_direct(u64 *digest, struct rng *r)
{
	struct slot *s = any_slot(r);

	if (!s->pages)
		return;
	struct range g = range_of(r, s, 64);
	off_t at = (off_t)below(r, FILE_PAGES - 64) * (off_t)PAGE;
	fold(digest, (u64)said(pread(direct_file, g.at, g.bytes, at)));
}

static void op_process_vm(u64 *digest, struct rng *r)
{
	struct iovec here[IOVS], there[IOVS];
	int n = pieces(r, here, 40000), m = pieces(r, there, 40000), write = (int)below(r, 2);
	pid_t pid = getpid();

	if (overlap(here, n, there, m))
		return;
	fold(digest, (u64)said(write ? process_vm_writev(pid, here, (u64)n, there, (u64)m, 0)
				     : process_vm_readv(pid, here, (u64)n, there, (u64)m, 0)));
}

/* /proc/self/mem reads and writes whatever the protection is. */
/* Load from every page; 0 where one cannot be loaded from. */
static int touch(const char *at, size_t length)
{
	if (sigsetjmp(escape, 0))
		return 0;
	armed = 1;
	for (u64 page = (u64)at & ~(PAGE - 1); page < (u64)at + length; page += PAGE)
		(void)*(volatile const char *)page;
	armed = 0;
	return 1;
}

/*
 * What a program has dropped of a merged range /proc/PID/mem cannot reach before it is touched again
 * (README, limits): the kernel does not let that access wait for the guard. So it is touched first.
 */
static void op_mem(u64 *digest, struct rng *r)
{
	struct iovec one[IOVS], two[IOVS];

	pieces(r, one, 20000);
	pieces(r, two, 20000);
	size_t length = one->iov_len < two->iov_len ? one->iov_len : two->iov_len;
	int reads = below(r, 2);

	if (!touch(two->iov_base, length))
		fold(digest, fault_kind);
	else if (reads)
		fold(digest, (u64)said(pread(self_mem, one->iov_base, length,
					     (off_t)(uintptr_t)two->iov_base)));
	else
		fold(digest, (u64)said(pwrite(self_mem, one->iov_base, length,
					      (off_t)(uintptr_t)two->iov_base)));
}

/* Plain copies between candidates. */
static void op_copy(u64 *digest, struct rng *r)
{
	struct slot *s = any_slot(r), *t = any_slot(r);

	if (!s->pages || !t->pages || s == t)
		return;
	struct range from = range_of(r, s, 64), to = range_of(r, t, 64);
	volatile long done = 0;
	if (sigsetjmp(escape, 0)) {
		fold(digest, fault_kind);
	} else {
		armed = 1;
		while (done < from.pages && done < to.pages) {
			memcpy(to.at + (u64)done * PAGE, from.at + (u64)done * PAGE, PAGE);
			done++;
		}
		armed = 0;
	}
	fold(digest, (u64)done);
}

#endif
