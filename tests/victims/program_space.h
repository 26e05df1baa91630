/*
 * The address space of program.c: slots at fixed places, access that survives faults, and digests.
 *
 * Nothing is remembered of what a page should hold: whatever a load or a system call gives, a fault
 * included, goes into the digest, and twins with one seed must get the same. Only what is needed to
 * choose operations is kept, and it follows from the seed and from results that must be equal.
 */
#ifndef PROGRAM_SPACE_H
#define PROGRAM_SPACE_H

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define SLOTS 20
#define THREADS 3
#define HALF (8UL << 20) /* a slot has two places, so that it can move; each leaves room to grow */
#define STRIDE (2 * HALF)
#define MOST 1536 /* pages of a slot */
#define BASE 0x210000000000UL

typedef uint64_t u64;

/* What a slot is besides plain private memory, readable and writable throughout. */
enum trait {
	MIXED = 1,   /* holes, protections, guard pages */
	LOCKED = 2,
	KEPT = 4,    /* MADV_DONTFORK */
	WIPED = 8,   /* MADV_WIPEONFORK */
	UNDUMPED = 16,
	SHARED = 32, /* MAP_SHARED of a memfd */
	FILED = 64,  /* MAP_PRIVATE of a memfd */
	FAULTED = 128, /* a userfaultfd of our own */
};

struct slot {
	char *home, *at;
	long pages;
	unsigned traits;
};

struct rng {
	u64 state;
};

static struct slot slots[SLOTS];
static struct slot own[THREADS]; /* one for each thread, nobody else's */
static u64 offset_bytes;         /* the same program at another address */

static __thread sigjmp_buf escape;
static __thread volatile sig_atomic_t armed;
static __thread volatile u64 fault_kind;

static void die(const char *what)
{
	fprintf(stderr, "program: %s: %s\n", what, strerror(errno));
	_exit(70);
}

static inline u64 mix(u64 x)
{ /* splitmix64's finalizer */
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
	return x ^ x >> 31;
}

static inline u64 next(struct rng *r) { return mix(r->state += 0x9e3779b97f4a7c15ULL); }
static inline long below(struct rng *r, long n) { return (long)(next(r) % (u64)n); }

static inline void fold(u64 *digest, u64 x) { *digest = mix(*digest * 31 + x + 1); }
/* A result that is no address: itself, or its error. */
static inline long said(long result) { return result < 0 ? -errno : result; }

static void on_fault(int number, siginfo_t *info, void *context)
{
	(void)context;
	if (!armed) {
		char line[96];
		int n = snprintf(line, sizeof line, "program: signal %d code %d at %p\n", number,
				 info->si_code, info->si_addr);
		(void)!write(2, line, (size_t)n);
		_exit(71);
	}
	armed = 0;
	fault_kind = 0xfa000000 | (u64)(number << 8 | (info->si_code & 0xff));
	siglongjmp(escape, 1);
}

static __attribute__((noinline)) u64 sum_words(const volatile u64 *words)
{
	u64 a = 1, b = 2;

	for (u64 i = 0; i < WORDS; i += 2) {
		a = (a ^ words[i]) * 0xff51afd7ed558ccdULL;
		b = (b ^ words[i + 1]) * 0xc4ceb9fe1a85ec53ULL;
		a ^= a >> 32;
		b ^= b >> 29;
	}
	return mix(a + 3 * b);
}

/* The bytes of one page, or how it faults. */
static __attribute__((noinline)) u64 page_sum(const char *page)
{
	u64 sum;

	if (sigsetjmp(escape, 0))
		return fault_kind;
	armed = 1;
	sum = sum_words((const volatile u64 *)page);
	armed = 0;
	return sum;
}

/* Add to a word, and put it back if that is odd: what it was before, or how it faults. */
static __attribute__((noinline)) u64 poke(u64 *word, u64 add)
{
	u64 old;

	if (sigsetjmp(escape, 0))
		return fault_kind;
	armed = 1;
	old = __atomic_fetch_add(word, add, __ATOMIC_SEQ_CST);
	if (add & 1)
		__atomic_store_n(word, old, __ATOMIC_SEQ_CST);
	armed = 0;
	return old;
}

/*
 * Contents are few, so that there are duplicates inside one process, too: by `id` of a page. 0 is
 * zeros; ids below 4096 are common; others belong to one place and moment of all twins.
 */
static void paint_page(char *page, u64 id)
{
	volatile u64 *words = (volatile u64 *)page;
	u64 x = mix(id);

	for (u64 i = 0; i < WORDS; i++)
		words[i] = id ? x + i * 0x9e3779b97f4a7c15ULL : 0;
}

/* Paint pages until one faults: how many were done, and the fault goes into the digest. */
static void paint(u64 *digest, char *at, long pages, u64 id, int run)
{
	volatile long done = 0;

	if (sigsetjmp(escape, 0)) {
		fold(digest, fault_kind);
	} else {
		armed = 1;
		while (done < pages) {
			paint_page(at + (u64)done * PAGE, run ? id + (u64)done : id);
			done++;
		}
		armed = 0;
	}
	fold(digest, (u64)done);
}

static u64 random_id(struct rng *r)
{
	switch (below(r, 8)) {
	case 0:
		return 0;
	case 1:
	case 2:
		return next(r) | 1UL << 63;
	default:
		return 1 + (u64)below(r, 40) * 100;
	}
}

static struct slot *any_slot(struct rng *r) { return &slots[below(r, SLOTS)]; }
static int plain(const struct slot *s) { return s->pages && !s->traits; }

/* A plain slot that is not *but*; NULL when eight throws find none. */
static struct slot *plain_slot(struct rng *r, const struct slot *but)
{
	for (int i = 0; i < 8; i++) {
		struct slot *s = any_slot(r);

		if (plain(s) && s != but)
			return s;
	}
	return NULL;
}

struct range {
	struct slot *slot;
	char *at;
	long first, pages;
	size_t bytes;
};

/* What the operation at work has chosen last, for the trace. */
static __thread struct { long slot, first, pages, how; } noted;

/* Mostly short ranges, sometimes a whole slot. The slot has at least one page. */
static struct range range_of(struct rng *r, struct slot *s, long most)
{
	struct range got = { .slot = s, .first = below(r, s->pages) };
	long room = s->pages - got.first, limit = most < room ? most : room;

	got.pages = below(r, 4) ? 1 + below(r, limit < 16 ? limit : 16) : 1 + below(r, limit);
	if (most >= MOST && !below(r, 24)) {
		got.first = 0;
		got.pages = s->pages;
	}
	got.at = s->at + (u64)got.first * PAGE;
	got.bytes = (size_t)got.pages * PAGE;
	noted.slot = s - slots;
	noted.first = got.first;
	noted.pages = got.pages;
	return got;
}

static long unmap(char *at, size_t bytes) { return said(munmap(at, bytes)); }

static char *map_at(char *at, size_t bytes, int prot, int flags, int fd)
{
	char *got = mmap(at, bytes, prot, MAP_FIXED | flags, fd, 0);

	if (got != at)
		die("mmap");
	return got;
}

static void lay_out(void)
{
	for (int i = 0; i < SLOTS + THREADS; i++) {
		struct slot *s = i < SLOTS ? &slots[i] : &own[i - SLOTS];

		s->home = (char *)(BASE + (u64)i * STRIDE + offset_bytes);
	}
}

#endif
