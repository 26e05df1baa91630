/* Operations of program.c on the address space itself. */
#ifndef PROGRAM_MM_H
#define PROGRAM_MM_H

#include <malloc.h>

#include "program_space.h"

#ifndef MADV_COLD
#define MADV_COLD 20
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define ADV_GUARD_INSTALL 102
#define ADV_GUARD_REMOVE 103
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

static void empty(struct slot *s)
{
	if (munmap(s->home, STRIDE - PAGE))
		die("munmap of a slot");
	s->pages = 0;
	s->traits = 0;
	s->at = s->home;
}

static long a_size(struct rng *r)
{
	return below(r, 10) ? 16 + below(r, 240) : 512 + below(r, MOST - 512);
}

/*
 * README, limits: flags that madvise gives a single page between a scan and the stop may be lost. So
 * MADV_DONTFORK and its like are given to many pages, in which nothing has been yet.
 */
static void give_trait(struct rng *r, struct slot *s, size_t bytes)
{
	static const struct { int advice; unsigned trait; } kinds[] = {
		{ MADV_DONTFORK, KEPT }, { MADV_WIPEONFORK, WIPED }, { MADV_DONTDUMP, UNDUMPED },
	};
	long kind = below(r, 14);

	if (kind < 3) {
		if (madvise(s->at, bytes, kinds[kind].advice))
			die("a flag for fresh memory");
		s->traits |= kinds[kind].trait;
	} else if (kind == 3) {
		if (mlock(s->at, bytes))
			die("mlock of fresh memory");
		s->traits |= LOCKED;
	}
}

static void op_fresh(u64 *digest, struct rng *r)
{
	struct slot *s = any_slot(r);
	long kind = below(r, 12);

	empty(s);
	s->pages = a_size(r);
	size_t bytes = (size_t)s->pages * PAGE;
	if (kind < 2) {
		int fd = memfd_create("program", MFD_CLOEXEC);

		if (fd < 0 || ftruncate(fd, (off_t)bytes))
			die("memfd");
		map_at(s->at, bytes, PROT_READ | PROT_WRITE, kind ? MAP_SHARED : MAP_PRIVATE, fd);
		s->traits = kind ? SHARED : FILED;
		close(fd);
	} else {
		map_at(s->at, bytes, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | (below(r, 2) ? MAP_NORESERVE : 0), -1);
		give_trait(r, s, bytes);
	}
	for (long p = 0; p < s->pages;) {
		long n = 1 + below(r, s->pages - p);

		if (below(r, 5)) /* else never touched */
			paint(digest, s->at + (u64)p * PAGE, n, random_id(r), (int)below(r, 2));
		p += n;
	}
}

static void op_paint(u64 *digest, struct rng *r)
{
	struct slot *s = any_slot(r);

	if (s->pages) {
		struct range g = range_of(r, s, 256);

		paint(digest, g.at, g.pages, random_id(r), (int)below(r, 2));
	}
}

/* Single words, half of them put back at once: a written page that is equal again. */
static void op_poke(u64 *digest, struct rng *r)
{
	struct slot *s = any_slot(r);

	if (!s->pages)
		return;
	for (int i = 0; i < 8; i++) {
		char *page = s->at + (u64)below(r, s->pages) * PAGE;
		u64 *word = (u64 *)page + below(r, WORDS);

		fold(digest, poke(word, next(r)));
	}
}

static void op_look(u64 *digest, struct rng *r)
{
	struct slot *s = any_slot(r);

	if (s->pages)
		for (int i = 0; i < 16; i++)
			fold(digest, page_sum(s->at + (u64)below(r, s->pages) * PAGE));
}

static void op_unmap(u64 *digest, struct rng *r)
{
	struct slot *s = any_slot(r);

	if (!s->pages)
		return;
	struct range g = range_of(r, s, 64);
	fold(digest, (u64)unmap(g.at, g.bytes));
	s->traits |= MIXED;
}

/* Fresh memory over whatever is there. */
static void op_over(u64 *digest, struct rng *r)
{
	struct slot *s = any_slot(r);

	/* README, limits: memory beside a program's own userfaultfd may be merged, and a merged part
	 * fails what its UFFDIO_UNREGISTER asks of the whole; so a registered slot stays whole. */
	if (!s->pages || s->traits & FAULTED)
		return;
	struct range g = range_of(r, s, 128);
	map_at(g.at, g.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	if (s->traits & ~(unsigned)MIXED)
		s->traits |= MIXED; /* not all of one kind any more */
	paint(digest, g.at, 1 + below(r, g.pages), random_id(r), (int)below(r, 2));
}

static void op_protect(u64 *digest, struct rng *r)
{
	static const int prots[] = { PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE,
				     PROT_READ | PROT_WRITE, PROT_READ | PROT_EXEC };
	struct slot *s = any_slot(r);

	if (!s->pages)
		return;
	struct range g = range_of(r, s, 128);
	int prot = prots[below(r, 5)];
	noted.how = prot;
	fold(digest, (u64)said(mprotect(g.at, g.bytes, prot)));
	if (prot != (PROT_READ | PROT_WRITE))
		s->traits |= MIXED;
	if (below(r, 3)) /* mostly for a moment only */
		fold(digest, (u64)said(mprotect(g.at, g.bytes, PROT_READ | PROT_WRITE)));
}

/* Advice whose result and effect are those of plain memory. */
static void op_advise(u64 *digest, struct rng *r)
{
	static const int advices[] = {
		MADV_DONTNEED, MADV_DONTNEED, MADV_DONTNEED, MADV_DONTNEED_LOCKED, MADV_COLD,
		MADV_PAGEOUT, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_POPULATE_READ,
		MADV_POPULATE_WRITE, ADV_GUARD_INSTALL, ADV_GUARD_REMOVE, MADV_WILLNEED,
		MADV_NORMAL,
	};
	struct slot *s = any_slot(r);

	if (!s->pages)
		return;
	struct range g = range_of(r, s, 256);
	int advice = advices[below(r, sizeof advices / sizeof *advices)];
	noted.how = advice;
	fold(digest, (u64)said(madvise(g.at, g.bytes, advice)));
	if (advice == ADV_GUARD_INSTALL)
		s->traits |= MIXED;
}

/* Advice that README's limits name, or that promises nothing: the result is not compared. */
static void op_advise_other(u64 *digest, struct rng *r)
{
	struct slot *s = plain_slot(r, NULL);

	if (!s)
		return;
	struct range g = range_of(r, s, 128);
	noted.how = below(r, 5);
	switch (noted.how) {
	case 0:
		/* README, limits: MADV_FREE on merged pages fails with EINVAL. What it leaves on
		 * other pages is up to the kernel, so everything is written again. */
		(void)!madvise(g.at, g.bytes, MADV_FREE);
		paint(digest, g.at, g.pages, random_id(r), (int)below(r, 2));
		break;
	case 1:
		/* README, limits: MADV_WIPEONFORK on merged pages fails with EINVAL; taken back. */
		(void)!madvise(g.at, g.bytes, MADV_WIPEONFORK);
		fold(digest, (u64)said(madvise(g.at, g.bytes, MADV_KEEPONFORK)));
		break;
	case 2:
		/* README, limits: MADV_REMOVE fails with EACCES instead of EINVAL. */
		fold(digest, madvise(g.at, g.bytes, MADV_REMOVE) != 0);
		break;
	case 3:
		/* madvise(2): best effort; it depends on free huge pages even without ksmd. */
		(void)!madvise(g.at, g.bytes, MADV_COLLAPSE);
		break;
	default:
		fold(digest, (u64)said(madvise(g.at, g.bytes, MADV_MERGEABLE)));
		fold(digest, (u64)said(madvise(g.at, g.bytes, MADV_UNMERGEABLE)));
	}
}

static void op_lock(u64 *digest, struct rng *r)
{
	struct slot *s = any_slot(r);

	if (!s->pages)
		return;
	struct range g = range_of(r, s, 64);
	if (below(r, 2)) {
		fold(digest, (u64)said(mlock(g.at, g.bytes)));
		s->traits |= LOCKED | MIXED;
		if (below(r, 2))
			return;
	}
	fold(digest, (u64)said(munlock(g.at, g.bytes)));
}

/*
 * README, limits: mremap across the border of a merged part fails with EFAULT. A program then does
 * by hand what it asked for, as glibc's realloc does; both twins end in the same state. Linux 6.17
 * and later move mapping by mapping, and what was moved before the failure stays moved: those are
 * the pages that are mapped at the target, which was empty.
 */
static int by_hand(u64 *digest, char *got)
{
	if (got == MAP_FAILED && errno == EFAULT)
		return 1;
	if (got == MAP_FAILED)
		fold(digest, (u64)-errno);
	return 0;
}

static void move_by_hand(char *to, char *from, long pages)
{
	for (long p = 0; p < pages; p++) {
		char *source = from + (u64)p * PAGE, *target = to + (u64)p * PAGE;
		unsigned char vec;

		if (mincore(target, PAGE, &vec) == 0)
			continue;
		map_at(target, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		memcpy(target, source, PAGE);
	}
}

static void resize(u64 *digest, struct rng *r, struct slot *s)
{
	long pages = below(r, 2) ? 1 + below(r, s->pages) : s->pages + 1 + below(r, 64);
	size_t old = (size_t)s->pages * PAGE, new = (size_t)pages * PAGE;
	int away = (int)below(r, 2);
	char *other = s->at == s->home ? s->home + HALF : s->home;
	char *got = away ? mremap(s->at, old, new, MREMAP_MAYMOVE | MREMAP_FIXED, other)
			 : mremap(s->at, old, new, 0);

	if (by_hand(digest, got)) {
		if (away) {
			long kept = pages < s->pages ? pages : s->pages;

			move_by_hand(other, s->at, kept);
			munmap(s->at, old);
			if (pages > kept)
				map_at(other + (u64)kept * PAGE, (size_t)(pages - kept) * PAGE,
				       PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		} else if (new > old) {
			map_at(s->at + old, new - old, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1);
		} else {
			munmap(s->at + new, old - new);
		}
	}
	if (away)
		s->at = other;
	s->pages = pages;
}

/* Part of one slot to the place of a part of another. */
static void move_part(u64 *digest, struct rng *r, struct slot *s, struct slot *t)
{
	struct range from = range_of(r, s, t->pages < 128 ? t->pages : 128);
	char *to = t->at + (u64)below(r, t->pages - from.pages + 1) * PAGE;
	int keep = (int)below(r, 2);

	noted.how = 1000 * (t - slots) + (to - t->at) / (long)PAGE;
	fold(digest, (u64)unmap(to, from.bytes));
	char *got = mremap(from.at, from.bytes, from.bytes,
			   MREMAP_MAYMOVE | MREMAP_FIXED | (keep ? MREMAP_DONTUNMAP : 0), to);

	if (by_hand(digest, got)) {
		move_by_hand(to, from.at, from.pages);
		if (keep)
			map_at(from.at, from.bytes, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1);
		else
			munmap(from.at, from.bytes);
	}
	if (!keep)
		s->traits |= MIXED;
}

static void op_remap(u64 *digest, struct rng *r)
{
	struct slot *s = plain_slot(r, NULL), *t = plain_slot(r, s);

	if (s && (!t || below(r, 2)) && s->pages + 64 <= (long)(HALF / PAGE))
		resize(digest, r, s);
	else if (s && t)
		move_part(digest, r, s, t);
}

static char *brk_start;
static long brk_pages;

/*
 * malloc takes all that it will ever need of the heap now. README, limits: where mremap fails,
 * glibc's realloc falls back to copying, and it would then grow the heap at other moments.
 */
static void set_up_heap(void)
{
	mallopt(M_MMAP_THRESHOLD, 128 << 10);
	mallopt(M_TRIM_THRESHOLD, 1 << 30);
	mallopt(M_TOP_PAD, 64 << 20);
	void *volatile first = malloc(1000); /* volatile: or the compiler leaves both calls out */
	free(first);
	if (sbrk((intptr_t)(-(uintptr_t)sbrk(0) & (PAGE - 1))) == (void *)-1)
		die("sbrk");
	brk_start = sbrk(0);
}

/* The heap's own end: what comes back after a shrink must be zeros. */
static void op_brk(u64 *digest, struct rng *r)
{
	long pages = below(r, 96);

	if ((char *)sbrk(0) != brk_start + (u64)brk_pages * PAGE)
		die("malloc has moved the end of the heap");
	if (sbrk((pages - brk_pages) * (long)PAGE) == (void *)-1)
		die("sbrk");
	if (pages > brk_pages) {
		for (long p = brk_pages; p < pages; p++)
			fold(digest, page_sum(brk_start + (u64)p * PAGE));
		paint(digest, brk_start, pages, random_id(r), 1);
	}
	brk_pages = pages;
	for (long p = 0; p < pages; p++)
		fold(digest, page_sum(brk_start + (u64)p * PAGE));
}

#endif
