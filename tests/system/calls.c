/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Calls that take memory as their argument, each on pages of its own: what they answer is written as
 * "name=errno" (0: it went well) or "name=what was found", a line each. Started as "calls", it tells
 * its arena ("ready address= pages="), and makes the calls when a line comes.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096UL
#define PAGES 1024L
#define EACH 16 /* pages for one group of calls; they use the first eight at most */

enum { GUARD_INSTALL = 102, GUARD_REMOVE = 103, SET_VMA = 0x53564d41, NR_MSEAL = 462 };

static char *arena, *elsewhere;
static long used;

static char *fresh(void)
{
	char *at = arena + used * PAGE;

	used += EACH;
	errno = 0;
	return at;
}

static void tell(const char *name, long answer)
{
	printf("%s=%d\n", name, answer == -1 ? errno : 0);
	errno = 0;
}

static void found(const char *name, long what)
{
	printf("%s=%ld\n", name, what);
}

static int resident(char *at)
{
	unsigned char held[8];
	int n = 0;

	if (mincore(at, sizeof(held) * PAGE, held))
		return -errno;
	for (unsigned i = 0; i < sizeof(held); i++)
		n += held[i] & 1;
	return n;
}

static void advise(void)
{
	static const int some[] = { 0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
				    22, 23, 24, 25, GUARD_INSTALL, 104 };

	for (unsigned i = 0; i < sizeof(some) / sizeof(*some); i++) {
		char name[32], *at = fresh();
		long answer = madvise(at, 8 * PAGE, some[i]);

		snprintf(name, sizeof(name), "madvise-%d", some[i]);
		tell(name, answer);
		if (some[i] == GUARD_INSTALL) {
			tell("madvise-103", madvise(at, 8 * PAGE, GUARD_REMOVE));
			found("behind-guards", *(volatile char *)(at + PAGE));
		}
	}
}

static void lock_and_sync(void)
{
	char *at = fresh();

	tell("mlock", mlock(at, 4 * PAGE));
	tell("munlock", munlock(at, 4 * PAGE));
	at = fresh();
	tell("mlock2-onfault", syscall(SYS_mlock2, at, 4 * PAGE, 1));
	tell("msync-invalidate-locked", msync(at, 4 * PAGE, MS_SYNC | MS_INVALIDATE));
	tell("dontneed-locked", madvise(at, 4 * PAGE, MADV_DONTNEED));
	at = fresh();
	tell("msync-async", msync(at, 4 * PAGE, MS_ASYNC));
	tell("msync-sync", msync(at, 4 * PAGE, MS_SYNC));
	tell("msync-invalidate", msync(at, 4 * PAGE, MS_SYNC | MS_INVALIDATE));
	at = fresh();
	found("resident", resident(at));
	madvise(at, 4 * PAGE, MADV_DONTNEED);
	found("resident-half-dropped", resident(at));
}

static void protect(void)
{
	char *at = fresh();

	tell("mprotect-none", mprotect(at, 4 * PAGE, PROT_NONE));
	tell("mprotect-all", mprotect(at, 4 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC));
	tell("mprotect-growsdown", mprotect(at, 4 * PAGE, PROT_READ | PROT_GROWSDOWN));
	tell("mprotect-rw", mprotect(at, 4 * PAGE, PROT_READ | PROT_WRITE));
	tell("pkey_mprotect", syscall(SYS_pkey_mprotect, at, 4 * PAGE, PROT_READ, -1));
	at = fresh();
	tell("mseal", syscall(NR_MSEAL, at, 4 * PAGE, 0));
	tell("mprotect-sealed", mprotect(at, 4 * PAGE, PROT_READ));
	tell("dontneed-sealed", madvise(at, 4 * PAGE, MADV_DONTNEED));
	tell("munmap-sealed", munmap(at, 4 * PAGE));
	at = fresh();
	mprotect(at, 4 * PAGE, PROT_READ);
	syscall(NR_MSEAL, at, 4 * PAGE, 0);
	tell("dontneed-sealed-readonly", madvise(at, 4 * PAGE, MADV_DONTNEED));
}

static void move(void)
{
	char *at = fresh(), *to;

	tell("mremap-shrink", (long)mremap(at, 4 * PAGE, 2 * PAGE, 0));
	at = fresh();
	tell("mremap-fixed", (long)mremap(at, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere));
	at = fresh();
	to = mremap(at, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP);
	tell("mremap-dontunmap", (long)to);
	found("left-behind", at[8]);
	at = fresh();
	tell("mremap-grow-inside", (long)mremap(at, 4 * PAGE, 8 * PAGE, MREMAP_MAYMOVE));
	at = fresh();
	tell("mremap-nothing", (long)mremap(at, 0, 4 * PAGE, MREMAP_MAYMOVE));
	at = fresh();
	tell("remap_file_pages", syscall(SYS_remap_file_pages, at, 4 * PAGE, 0, 0, 0));
}

static void place(void)
{
	char *at = fresh();
	void *two[] = { at, at + PAGE };
	int where[] = { -1, -1 }, nodes[] = { 0, 0 };

	tell("move_pages-query", syscall(SYS_move_pages, 0, 2UL, two, NULL, where, 0));
	found("node", where[0]);
	tell("move_pages", syscall(SYS_move_pages, 0, 2UL, two, nodes, where, 2));
	found("moved", where[0]);
	at = fresh();
	tell("mbind", syscall(SYS_mbind, at, 4 * PAGE, 0, NULL, 0, 0));
	tell("mbind-move", syscall(SYS_mbind, at, 4 * PAGE, 0, NULL, 0, 2));
}

static void others(void)
{
	char *at = fresh();
	int ends[2];
	struct iovec one = { at, PAGE };

	if (!pipe(ends)) {
		tell("vmsplice", syscall(SYS_vmsplice, ends[1], &one, 1UL, 0));
		tell("vmsplice-gift", syscall(SYS_vmsplice, ends[1], &one, 1UL, 8));
	}
	at = fresh();
	tell("name", syscall(SYS_prctl, SET_VMA, 0, at, 4 * PAGE, "some"));
	at = fresh();
	tell("munmap", munmap(at, 4 * PAGE));
	tell("mmap-noreplace", (long)mmap(at + 4 * PAGE, PAGE, PROT_READ,
					  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0));
}

int main(void)
{
	char line[16];
	size_t size = PAGES * PAGE;
	char *all = mmap(NULL, size + 64 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	elsewhere = all;
	arena = mmap(all + 32 * PAGE, size, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if (all == MAP_FAILED || arena == MAP_FAILED)
		return 1;
	for (size_t i = 0; i < size / 8; i++)
		((uint64_t *)arena)[i] = (i + 1) * 0x9E3779B97F4A7C15UL;
	printf("ready address=%#lx pages=%ld\n", (unsigned long)arena, PAGES);
	fflush(stdout);
	if (!fgets(line, sizeof(line), stdin))
		return 1;
	advise();
	lock_and_sync();
	protect();
	move();
	place();
	others();
	return used > PAGES;
}
