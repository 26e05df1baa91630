/*
 * What the arena must hold: a pure function of (seed, logical page number), never a copy.
 *
 * A victim that kept a copy of its memory to compare with would hold every page twice, and a merge
 * of the two would hide what the victim is there to notice. So the expected value of each word is
 * computed anew. What the victim itself changed is kept as a few bytes a page (struct change).
 */
#ifndef CONTENT_H
#define CONTENT_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)

enum kind { EQUAL, TWIN, UNIQUE, TAIL, ZERO, NKINDS };

struct change {
	uint32_t version; /* of the words that `write` wrote; 0: none */
	uint32_t dropped; /* since then: the page was zeros */
};

struct arena {
	volatile uint64_t *words;
	long pages;
	uint64_t seed, salt;
	const char *layout;
	struct change *changes;
	uint32_t *flux; /* `hammer`'s sequence locks: odd while a page is being changed */
};

static struct arena arena;

static inline uint64_t mix(uint64_t x)
{ /* splitmix64's finalizer */
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
	return x ^ x >> 31;
}

/* Which kind of page stands at logical page number p. */
static enum kind kind_of(long p)
{
	const char *layout = arena.layout;

	if (!strcmp(layout, "runs:long")) /* 1023 neighbours, then one page of our own */
		return p % 1024 == 1023 ? UNIQUE : EQUAL;
	if (!strcmp(layout, "runs:short"))
		return p % 8 == 7 ? UNIQUE : EQUAL;
	if (!strcmp(layout, "singles"))
		return p % 2 ? UNIQUE : EQUAL;
	if (!strcmp(layout, "zeros"))
		return ZERO;
	if (!strcmp(layout, "unique"))
		return UNIQUE;
	if (!strcmp(layout, "tails")) /* differs from every other victim's in its last word only */
		return TAIL;
	if (!strcmp(layout, "mixed")) { /* of 32: 16 in a run, 4 twins, 2 singles, 4 zeros, 6 own */
		long at = p % 32;
		if (at < 16)
			return EQUAL;
		if (at < 20)
			return TWIN;
		if (at < 24)
			return at % 2 ? UNIQUE : EQUAL;
		return at < 28 ? ZERO : UNIQUE;
	}
	fprintf(stderr, "victim: no such layout: %s\n", layout);
	exit(2);
}

static inline uint64_t key_of(long p, enum kind kind)
{
	uint64_t number = kind == TWIN ? ~0ULL : (uint64_t)p;

	/* chained, as an exclusive or would make page 2 of seed 1 page 1 of seed 2 */
	uint64_t key = mix(mix(arena.seed) + number);

	return kind == UNIQUE ? mix(key + mix(~arena.salt)) : key;
}

/* The word i of page p, as it must be now. */
static inline uint64_t expected(long p, long i, enum kind kind, uint64_t key)
{
	const struct change *change = &arena.changes[p];

	if (change->version && i % 64 == p % 64)
		return mix(key ^ arena.salt ^ (uint64_t)change->version << 32 ^ (uint64_t)i);
	if (change->dropped || kind == ZERO)
		return 0;
	if (kind == TAIL && i == WORDS - 1)
		return mix(key ^ mix(~arena.salt));
	return mix(key + (uint64_t)i);
}

static inline volatile uint64_t *page_of(long p)
{
	return arena.words + p * WORDS;
}

/* Write page p as it must be; *only* the words of its version if only_version is set. */
static void fill_page(long p, int only_version)
{
	enum kind kind = kind_of(p);
	uint64_t key = key_of(p, kind);
	volatile uint64_t *w = page_of(p);

	for (long i = only_version ? p % 64 : 0; i < (long)WORDS; i += only_version ? 64 : 1)
		w[i] = expected(p, i, kind, key);
}

/* The number of wrong words in page p; *sum takes every word in. */
static long verify_page(long p, uint64_t *sum)
{
	enum kind kind = kind_of(p);
	uint64_t key = key_of(p, kind), total = 0;
	volatile uint64_t *w = page_of(p);
	long bad = 0;

	for (long i = 0; i < (long)WORDS; i++) {
		uint64_t word = w[i];
		bad += word != expected(p, i, kind, key);
		total = total * 0x100000001b3ULL + word;
	}
	if (sum)
		*sum = mix(*sum ^ total);
	return bad;
}

static long nonzero_words(long p)
{
	volatile uint64_t *w = page_of(p);
	long found = 0;

	for (long i = 0; i < (long)WORDS; i++)
		found += w[i] != 0;
	return found;
}

/* The number of wrong pages among [first, first + n). */
static long verify(long first, long n, uint64_t *sum)
{
	long bad = 0;

	for (long p = first; p < first + n; p++)
		bad += verify_page(p, sum) != 0;
	return bad;
}

#endif
