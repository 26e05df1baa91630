/*
 * One worker of the benchmark: an arena of pages laid out as asked, and commands line by line.
 *
 *   worker LAYOUT NUMBER PAGES HUGE     LAYOUT: same scattered unique zeros runs
 *
 * It says "ready ranges=ADDRESS:PAGES" and then answers each line with "ok ...":
 *   mergeable        MADV_MERGEABLE on the arena
 *   read N           N dependent reads at random: "ns=" for each
 *   write N SEED     one word in each of N random pages: "ns=" for each, "pages="
 *   spin             start a thread that looks at the clock all the time, and at the arena
 *   still            end it: "pauses=" nanoseconds of every gap of 0.1 ms and more,
 *                    waits for a CPU taken out
 *   quit             (or end of input) leave
 *
 * Pages with the same number of content are equal in every worker. Layouts (h: half the pages):
 *   same        page i holds content i
 *   scattered   h pages at random places hold contents 0..h-1 in random order, the rest is unique
 *   unique      all pages differ
 *   zeros       each page is zero with probability 1/2, else unique
 *   runs        h pages in runs of geometric length (mean 8), the same runs in every worker but in
 *               another order, with runs of unique pages between them
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define HUGE_PAGE (2UL << 20)
#define WORDS (PAGE / 8)
#define GAP_NS 20000    /* gaps to look at: whoever waited for a CPU has at least such a one */
#define PAUSE_NS 100000 /* gaps to tell of: shorter ones are interrupts and context switches */
#define MAX_GAPS 65536

static uint64_t *arena;
static uint64_t npages;

static void die(const char *what)
{
    fprintf(stderr, "worker: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t next(uint64_t *state) /* splitmix64 */
{
    uint64_t z = (*state += 0x9E3779B97F4A7C15UL);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9UL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBUL;
    return z ^ (z >> 31);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000UL + t.tv_nsec;
}

static void fill(uint64_t page, uint64_t content)
{
    uint64_t state = content * 0xD1342543DE82EF95UL + 1;
    for (uint64_t i = 0; i < WORDS; i++)
        arena[page * WORDS + i] = next(&state);
}

static void shuffle(uint64_t *items, uint64_t n, uint64_t *state)
{
    for (uint64_t i = n; i > 1; i--) {
        uint64_t j = next(state) % i, item = items[i - 1];
        items[i - 1] = items[j];
        items[j] = item;
    }
}

static uint64_t geometric(uint64_t *state, uint64_t mean)
{
    uint64_t length = 1;
    while (next(state) % mean)
        length++;
    return length;
}

static uint64_t *numbers(uint64_t n)
{
    uint64_t *made = malloc((n + 1) * sizeof *made);
    if (!made)
        die("malloc");
    for (uint64_t i = 0; i < n; i++)
        made[i] = i;
    return made;
}

static void lay_scattered(uint64_t unique, uint64_t *mine)
{
    uint64_t *places = numbers(npages);
    shuffle(places, npages, mine);
    for (uint64_t i = 0; i < npages; i++)
        fill(places[i], i < npages / 2 ? i : unique + i);
    free(places);
}

static void lay_runs(uint64_t unique, uint64_t *mine)
{
    uint64_t everyone = 42, half = npages / 2, nruns = 0;
    uint64_t *starts = numbers(half + 1), *order = numbers(half + 1);
    for (uint64_t at = 0; at < half; nruns++) {
        starts[nruns] = at;
        at += geometric(&everyone, 8);
    }
    starts[nruns] = half;
    shuffle(order, nruns, mine);
    uint64_t page = 0, left = npages - half;
    for (uint64_t i = 0; i < nruns; i++) {
        uint64_t gap = geometric(mine, 8);
        for (; gap && left; gap--, left--, page++)
            fill(page, unique + page);
        for (uint64_t c = starts[order[i]]; c < starts[order[i] + 1]; c++)
            fill(page++, c);
    }
    for (; page < npages; page++)
        fill(page, unique + page);
    free(starts);
    free(order);
}

static void lay_out(const char *layout, uint64_t number)
{
    uint64_t unique = (number + 1) << 40, mine = number + 1;
    if (!strcmp(layout, "scattered")) {
        lay_scattered(unique, &mine);
        return;
    }
    if (!strcmp(layout, "runs")) {
        lay_runs(unique, &mine);
        return;
    }
    for (uint64_t i = 0; i < npages; i++) {
        if (!strcmp(layout, "same"))
            fill(i, i);
        else if (!strcmp(layout, "zeros") && next(&mine) & 1)
            memset(arena + i * WORDS, 0, PAGE);
        else
            fill(i, unique + i);
    }
}

static void reserve(int huge)
{
    uint64_t length = npages * PAGE;
    char *base = mmap(NULL, length + HUGE_PAGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        die("mmap");
    arena = (uint64_t *)(((uint64_t)base + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
    /* a kernel without huge pages refuses the advice: the caller looks at smaps */
    madvise(arena, length, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

static void read_at_random(uint64_t n)
{
    uint64_t at = 1, began = now();
    for (uint64_t i = 0; i < n; i++) {
        at = at * 6364136223846793005UL + 1442695040888963407UL;
        uint64_t where = (at >> 20) % (npages * WORDS);
        at += ((volatile uint64_t *)arena)[where]; /* the next address hangs on what was read */
    }
    printf("ok ns=%.2f\n", (double)(now() - began) / n);
}

static void write_at_random(uint64_t n, uint64_t seed)
{
    uint64_t *pages = numbers(npages), state = seed;
    n = n < npages ? n : npages;
    shuffle(pages, npages, &state);
    uint64_t began = now();
    for (uint64_t i = 0; i < n; i++)
        ((volatile uint64_t *)arena)[pages[i] * WORDS + 7] = seed + pages[i];
    printf("ok ns=%.1f pages=%lu\n", n ? (double)(now() - began) / n : 0.0, n);
    free(pages);
}

/* ---- pauses */

static volatile int spinning;
static pthread_t spinner;
static uint64_t gaps[MAX_GAPS], ngaps;

static uint64_t waited(int fd) /* nanoseconds that this thread has waited for a CPU */
{
    char text[128];
    unsigned long ran, delay;
    ssize_t got = pread(fd, text, sizeof text - 1, 0);
    if (got <= 0)
        return 0;
    text[got] = 0;
    return sscanf(text, "%lu %lu", &ran, &delay) == 2 ? delay : 0;
}

static void *spin(void *unused)
{
    int fd = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    uint64_t state = 7, before = waited(fd), last = now();
    while (spinning) {
        (void)((volatile uint64_t *)arena)[next(&state) % (npages * WORDS)];
        uint64_t t = now(), gap = t - last;
        if (gap >= GAP_NS) {
            uint64_t delay = waited(fd), waits = delay - before;
            before = delay;
            gap = gap > waits ? gap - waits : 0;
            if (gap >= PAUSE_NS && ngaps < MAX_GAPS)
                gaps[ngaps++] = gap;
            t = now();
        }
        last = t;
    }
    close(fd);
    return unused;
}

static void still(void)
{
    if (spinning) {
        spinning = 0;
        pthread_join(spinner, NULL);
    }
    printf("ok pauses=");
    for (uint64_t i = 0; i < ngaps; i++)
        printf(i ? ",%lu" : "%lu", gaps[i]);
    printf("\n");
    ngaps = 0;
}

static int answer(char *line)
{
    unsigned long a, b;
    if (!strncmp(line, "quit", 4))
        return 0;
    if (!strncmp(line, "mergeable", 9)) {
        if (madvise(arena, npages * PAGE, MADV_MERGEABLE))
            printf("no %s\n", strerror(errno));
        else
            printf("ok\n");
    } else if (sscanf(line, "read %lu", &a) == 1) {
        read_at_random(a);
    } else if (sscanf(line, "write %lu %lu", &a, &b) == 2) {
        write_at_random(a, b);
    } else if (!strncmp(line, "spin", 4) && !spinning) {
        spinning = 1;
        if (pthread_create(&spinner, NULL, spin, NULL))
            die("pthread_create");
        printf("ok\n");
    } else if (!strncmp(line, "still", 5)) {
        still();
    } else {
        printf("no such command\n");
    }
    return 1;
}

int main(int argc, char **argv)
{
    char line[256];
    if (argc != 5)
        return 2;
    npages = strtoul(argv[3], NULL, 10);
    reserve(atoi(argv[4]));
    lay_out(argv[1], strtoul(argv[2], NULL, 10));
    setvbuf(stdout, NULL, _IOFBF, 1 << 20);
    printf("ready ranges=%#lx:%lu\n", (unsigned long)arena, npages);
    do
        fflush(stdout);
    while (fgets(line, sizeof line, stdin) && answer(line));
    fflush(stdout);
    return 0;
}
