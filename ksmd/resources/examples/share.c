/*
 * A program that has its memory shared: a table that every instance of it holds alike.
 *
 *	cc -o share share.c		(ksmd install puts ksmd.h where the compiler finds it)
 *	./share [SOCKET] [MiB]
 *
 * Start it twice: the second one says how much of its table it shares with the first. A line on
 * stdin lets it share again, the end of stdin lets it end.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "ksmd.h"

static void fill(uint64_t *table, size_t words)
{
	uint64_t value = 88172645463325252u;

	for (size_t at = 0; at < words; at++) {
		value ^= value << 13; /* xorshift64: the same words in every instance */
		value ^= value >> 7;
		value ^= value << 17;
		table[at] = value;
	}
}

static int intact(const uint64_t *table, size_t words)
{
	uint64_t value = 88172645463325252u;

	for (size_t at = 0; at < words; at++) {
		value ^= value << 13;
		value ^= value >> 7;
		value ^= value << 17;
		if (table[at] != value)
			return 0;
	}
	return 1;
}

int main(int argc, char **argv)
{
	size_t size = (size_t)(argc > 2 ? atol(argv[2]) : 16) << 20;
	struct ksmd_counts counts;
	struct ksmd ksmd;
	uint64_t *table;
	long area;
	int line;

	table = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (table == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	fill(table, size / sizeof(*table));

	if (ksmd_open(&ksmd, argc > 1 ? argv[1] : NULL) < 0 ||
	    (area = ksmd_create_area(&ksmd)) < 0 ||
	    ksmd_register(&ksmd, area, table, size) < 0) {
		fprintf(stderr, "share: %s\n", ksmd_error(&ksmd));
		return 1;
	}
	do {
		if (ksmd_share(&ksmd, area, &counts) < 0) {
			fprintf(stderr, "share: %s\n", ksmd_error(&ksmd));
			return 1;
		}
		printf("address=%llu pages=%zu scanned=%ld merged=%ld intact=%d\n",
		       (unsigned long long)(uintptr_t)table, size / 4096, counts.scanned,
		       counts.merged, intact(table, size / sizeof(*table)));
		fflush(stdout);
		while ((line = getchar()) != '\n' && line != EOF)
			;
	} while (line != EOF);

	if (ksmd_remove(&ksmd, area) < 0) {
		fprintf(stderr, "share: %s\n", ksmd_error(&ksmd));
		return 1;
	}
	ksmd_close(&ksmd);
	return intact(table, size / sizeof(*table)) ? 0 : 1;
}
