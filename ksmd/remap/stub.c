/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The stub: the one program that ksmd runs inside a target, in one borrowed thread, while every
 * task of the target is stopped. It carries out a batch of records and removes all trace of itself.
 *
 * It is built to outlive its tracer. From its first instruction on it needs nobody: it makes its
 * own socket, takes what file descriptors were queued there (none, if the tracer is dead), and
 * leaves through a frame that the tracer laid down before: munmap(scratch), then rt_sigreturn to
 * the interrupted registers. Its markers are signals that are ignored where no tracer listens.
 *
 * Built freestanding, position independent, with general registers only (the target's vector and
 * x87 state is never touched). stub.py holds the bytes' layout; a test compiles this file and
 * compares the bytes with stub.bin.
 *
 * Hazards, each found by experiment:
 *  - A run is empty and registered MISSING while it is compared, so whoever touches it waits. That
 *    holds for this thread too: the tracer keeps pages that the kernel writes on a return to user
 *    mode (rseq areas) out of the records.
 *  - Fill the new mapping first, register the guard afterwards, then CONTINUE one page: registering
 *    first lets the pager answer a fault with zeros; without the CONTINUE the VMA has no anon_vma
 *    and fork would not copy its page table.
 *  - UFFDIO_MOVE may answer EEXIST although it moved pages (Linux 6.18); what it reports is then not
 *    to be trusted, so every page is moved back singly and the quarantine is looked at with mincore.
 *  - A page that the program dropped has no page table entry. In a mapping of the store without a
 *    guard it would read as store content. So a run that is to be lifted first has every such page
 *    filled with zeros, while the guard still stands: between the guard and the quarantine, and on
 *    the way back, another process might touch it. Presence is read from pagemap, never by touching.
 *  - From the mmap on, other processes write to the new mapping. If a later step fails, what they
 *    wrote there is taken along before the quarantine goes home.
 *  - What madvise has said of a mapping (not to be forked, dumped, kept in a child) would be lost with
 *    the mapping, and nothing shows it but smaps, which takes too long in here and is old when it
 *    was read before. So each mapping is tried: its first page is told the opposite. Where that cuts
 *    the page off from the next one, the flag was set, and it is given back.
 *  - mremap wants room for some mappings even where it needs none; at vm.max_map_count the way back
 *    would be barred. Spare mappings, made before anything is touched, are given up for it.
 */

typedef unsigned long u64;
typedef long i64;
typedef unsigned int u32;
typedef int i32;
typedef unsigned char u8;

#define INLINE static inline __attribute__((always_inline))
#define PAGE 4096UL
#define PAGE_TABLE (512 * PAGE) /* what one page table maps */

enum { SYS_mmap = 9, SYS_mprotect = 10, SYS_munmap = 11, SYS_ioctl = 16, SYS_pread64 = 17,
       SYS_mremap = 25, SYS_mincore = 27, SYS_madvise = 28, SYS_socket = 41, SYS_recvmsg = 47,
       SYS_close = 3, SYS_tgkill = 234, SYS_prlimit64 = 302 };
/* Made only where the program has locked memory itself, so no filter is asked about them. */
enum { RARE_mlock = 149, RARE_munlock = 150 };
enum { EAGAIN = 11, ENOMEM = 12, EEXIST = 17, EINVAL = 22, EMFILE = 24, ENODATA = 61, EOWNERDEAD = 130 };
enum { PROT_NONE = 0, PROT_READ = 1, PROT_RW = 3 };
enum { MAP_SHARED = 1, MAP_PRIVATE = 2, MAP_FIXED = 0x10, MAP_ANON_NORESERVE = 0x4022 };
enum { MREMAP_MAYMOVE = 1, MREMAP_FIXED = 2, MREMAP_DONTUNMAP = 4 };
enum { MADV_DONTFORK = 10, MADV_HUGEPAGE = 14, MADV_NOHUGEPAGE = 15, MADV_DONTDUMP = 16,
       MADV_WIPEONFORK = 18, MADV_COLD = 20, MADV_POPULATE_READ = 22, MADV_GUARD_INSTALL = 102 };
enum { MODE_MISSING = 1, MODE_MINOR = 4, CONTINUE_DONTWAKE = 1, MOVE_ALLOW_HOLES = 2 };
enum { AF_UNIX = 1, SOCK_DGRAM_CLOEXEC = 0x80002, RECV_FLAGS = 0x40000040, MSG_CTRUNC = 8 };
enum { O_CLOEXEC_NONBLOCK = 02004000, RLIMIT_NOFILE = 7 };

#define IOCTL(dir, nr, size) ((dir) << 30 | (size) << 16 | 0xAAu << 8 | (nr))
#define UFFDIO_REGISTER IOCTL(3u, 0x00u, 32u)
#define UFFDIO_UNREGISTER IOCTL(2u, 0x01u, 16u)
#define UFFDIO_WAKE IOCTL(2u, 0x02u, 16u)
#define UFFDIO_ZEROPAGE IOCTL(3u, 0x04u, 32u)
#define UFFDIO_MOVE IOCTL(3u, 0x05u, 40u)
#define UFFDIO_CONTINUE IOCTL(3u, 0x07u, 32u)
#define USERFAULTFD_IOC_NEW 0xAA00u

#define PM_PRESENT (1UL << 63)
#define PM_SWAPPED (1UL << 62)
#define PM_FILE (1UL << 61)
#define PM_GUARD (1UL << 58) /* MADV_GUARD_INSTALL, Linux 6.15 */

enum { MODE_WINDOW = 0, MODE_SETUP = 1 };
enum { OP_MERGE = 0, OP_ZERO = 1, OP_UNMERGE = 2, OP_REMERGE = 3 };
enum { REC_DONTFORK = 2, REC_DONTDUMP = 4, REC_WIPEONFORK = 8, REC_UNTRIED = 16, REC_SKIP = 32,
       REC_HUGEPAGE = 64, REC_NOHUGEPAGE = 128, REC_HARMLESS = 192, REC_MAPPING_SHIFT = 8 };
enum { RES_FLAGGED = 1000 }; /* -result of a record whose mapping has flags: this plus the flags */
/* stages a record reaches; +100: undone, +200: the undo failed */
enum { ST_NONE, ST_REGISTERED, ST_ASIDE, ST_EQUAL, ST_MAPPED, ST_FILLED, ST_GUARDED, ST_DONE };
enum { UNDONE = 100, STUCK = 200 };

struct record {
    u64 start, length, offset; /* bytes: in the target, and in the extent */
    u64 aside;                 /* bytes from the start of the quarantine */
    u32 op, prot, flags, stage;
    i64 result;                /* 0 done, 1 differs, -errno */
};

struct header {
    u64 mode, records, nrecords;
    i64 socket, alive_fd, track, guard, store, pagemap, device;
    u64 phase, marker, gadget, frame, scratch, scratch_len;
    u64 aside_len, fresh_len;           /* bytes to reserve; 0: none */
    u64 store_offset, store_len;        /* the part of the extent to compare with */
    u64 wake_start, wake_len;
    u64 nfds;                           /* how many descriptors the tracer sends */
    u64 trials, ntrials;                /* starts of mappings of two pages or more; then their flags */
    u64 pid, tid;                       /* as this thread knows itself */
    /* the stub's own */
    i64 error;
    u64 done, keep;
    u64 aside, fresh, store_map, alive_map, rlimit_soft, rlimit_hard, rlimit_raised;
    u64 fail_step, fail_errno, fail_record; /* fault injection by tests; step 0: none */
    u64 spare;
    u8 msghdr[64], iov[16], control[64], byte[16];
};

_Static_assert(sizeof(struct record) == 56, "stub.py packs 56 bytes");
_Static_assert(__builtin_offsetof(struct header, phase) == 80, "stub.py reads phase at 80");
_Static_assert(__builtin_offsetof(struct header, gadget) == 96, "the entry and the tail below");
_Static_assert(__builtin_offsetof(struct header, pid) == 200, "the entry below");
_Static_assert(__builtin_offsetof(struct header, msghdr) == 328, "stub.py packs msghdr at 328");
_Static_assert(sizeof(struct header) == 488, "stub.py packs 488 bytes");

INLINE i64 call6(i64 nr, u64 a, u64 b, u64 c, u64 d, u64 e, u64 f)
{
    i64 ret;
    register u64 r10 asm("r10") = d, r8 asm("r8") = e, r9 asm("r9") = f;
    asm volatile("syscall"
                 : "=a"(ret)
                 : "0"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                 : "rcx", "r11", "memory");
    return ret;
}
INLINE i64 call3(i64 nr, u64 a, u64 b, u64 c) { return call6(nr, a, b, c, 0, 0, 0); }
INLINE int failed(i64 ret) { return ret < 0 && ret > -4096; }

/* Tests name a step and an errno; in the field fail_step is 0 and this is one compare. */
INLINE i64 inject(struct header *h, u64 step, i64 real)
{
    return h->fail_step == step ? -(i64)h->fail_errno : real;
}
/* Where a call must not be made when it is to fail: the caller asks before. */
INLINE int fails(struct header *h, u64 step) { return h->fail_step == step; }

static i64 uffd_register(i64 fd, u64 start, u64 length, u64 mode)
{
    u64 arg[4] = { start, length, mode, 0 };
    return call3(SYS_ioctl, fd, UFFDIO_REGISTER, (u64)arg);
}
static i64 uffd_unregister(i64 fd, u64 start, u64 length)
{
    u64 arg[2] = { start, length };
    return call3(SYS_ioctl, fd, UFFDIO_UNREGISTER, (u64)arg);
}
static i64 uffd_move(i64 fd, u64 to, u64 from, u64 length, u64 mode, i64 *moved)
{
    u64 arg[5] = { to, from, length, mode, 0 };
    i64 ret = call3(SYS_ioctl, fd, UFFDIO_MOVE, (u64)arg);
    *moved = (i64)arg[4];
    return ret;
}

/*
 * The tracer's robust futex. The kernel sets OWNER_DIED there before it lets any tracee of a dead
 * tracer run, so a thread that could write to a run cannot be running while this says alive.
 */
static int tracer_dead(struct header *h)
{
    u32 word = *(volatile u32 *)h->alive_map;
    return !word || (word & 0x40000000);
}

static int differ(const u64 *a, const u64 *b, u64 length)
{
    for (u64 n = length / 64; n; n--, a += 8, b += 8)
        if (((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3])) |
            ((a[4] ^ b[4]) | (a[5] ^ b[5]) | (a[6] ^ b[6]) | (a[7] ^ b[7])))
            return 1;
    return 0;
}
static int not_zero(const u64 *a, u64 length)
{
    for (u64 n = length / 64; n; n--, a += 8)
        if (a[0] | a[1] | a[2] | a[3] | a[4] | a[5] | a[6] | a[7])
            return 1;
    return 0;
}
INLINE void copy(u64 *to, const u64 *from, u64 length)
{
    u64 n = length / 8;
    asm volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
}

static i64 move_all(struct header *h, u64 to, u64 from, u64 length, u64 *done)
{
    u64 at = 0;
    int tries = 0;
    while (at < length) {
        i64 moved, ret = uffd_move(h->track, to + at, from + at, length - at, 0, &moved);
        if (ret == 0)
            at = length;
        else if (moved > 0)
            at += moved;
        else if (ret != -EAGAIN || ++tries >= 1000) {
            *done = at;
            return ret;
        }
    }
    *done = at;
    return 0;
}

static int resident(u64 page)
{
    u8 vec[8];
    return call3(SYS_mincore, page, PAGE, (u64)vec) || (vec[0] & 1);
}

enum { SPARES = 12 };

/* Some mappings that nothing needs. Neighbours with unlike protections stay two. */
static i64 make_spares(struct header *h)
{
    i64 at = call6(SYS_mmap, 0, SPARES * PAGE, PROT_NONE, MAP_ANON_NORESERVE, -1, 0);
    if (failed(at))
        return at;
    h->spare = at;
    for (u64 i = 1; i < SPARES; i += 2) {
        i64 ret = call3(SYS_mprotect, at + i * PAGE, PAGE, PROT_READ);
        if (ret)
            return ret;
    }
    return 0;
}
static void drop_spares(struct header *h)
{
    if (h->spare)
        call3(SYS_munmap, h->spare, SPARES * PAGE, 0);
    h->spare = 0;
}

/* mremap to a fixed place; after a failure for want of room no further record is begun. */
static i64 put(struct header *h, u64 from, u64 length, u64 to)
{
    for (;;) {
        i64 ret = call6(SYS_mremap, from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to, 0);
        if (ret != -ENOMEM || !h->spare)
            return ret;
        drop_spares(h);
    }
}

/* Put a run back from quarantine. True when every page is home again. */
static int move_back(struct header *h, struct record *r, u64 aside, u64 moved, i64 why)
{
    u64 back = 0, left = 0;
    i64 ret = moved ? move_all(h, r->start, aside, moved, &back) : 0;
    if (!ret && why != -EEXIST)
        return 1;
    for (u64 at = 0; at < r->length; at += PAGE) {
        i64 n;
        int tries = 0;
        while (uffd_move(h->track, r->start + at, aside + at, PAGE, MOVE_ALLOW_HOLES, &n) == -EAGAIN
               && ++tries < 1000)
            ;
        left += resident(aside + at);
    }
    return !left;
}

static void undone(struct header *h, struct record *r, int home, i64 why)
{
    r->stage += home ? UNDONE : STUCK;
    if (!home) {
        h->keep = 1; /* the quarantine holds the only copy: it stays mapped */
        h->error = why;
    }
}

/* What the program has said about huge pages is said of its new mapping, too. It may fail. */
static void say_of_huge_pages(struct record *r, u64 address)
{
    if (r->flags & REC_HARMLESS)
        call3(SYS_madvise, address, r->length,
              r->flags & REC_HUGEPAGE ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

/*
 * Bring in every entry of a fresh mapping of the store, by a load of each page: the kernel answers
 * the first of them with the entries of its neighbours too, where MADV_POPULATE_READ goes to each by
 * itself, which takes four times as long. That call goes first, for one page of each page table, since
 * want of memory for the table is an error there, and in a load it would be the end of the process.
 */
static i64 bring_in(u64 at, u64 length)
{
    u64 end = at + length;
    while (at < end) {
        u64 next = (at | (PAGE_TABLE - 1)) + 1;
        i64 ret = call3(SYS_madvise, at, PAGE, MADV_POPULATE_READ);
        if (ret)
            return ret;
        for (at += PAGE; at < next && at < end; at += PAGE)
            (void)*(volatile u8 *)at;
    }
    return 0;
}

/* Give a fresh private mapping of the store its entries, its guard and its anon_vma. */
static i64 fill_and_guard(struct header *h, struct record *r)
{
    i64 ret;
    ret = inject(h, ST_FILLED, 0);
    if (!ret)
        ret = bring_in(r->start, r->length);
    if (ret)
        return ret;
    r->stage = ST_FILLED;
    /* before it is registered: only what is alike then becomes one mapping with its neighbour */
    say_of_huge_pages(r, r->start);
    ret = inject(h, ST_GUARDED, 0);
    if (!ret)
        ret = uffd_register(h->guard, r->start, r->length, MODE_MISSING | MODE_MINOR);
    if (ret)
        return ret;
    r->stage = ST_GUARDED;
    ret = inject(h, ST_DONE, 0);
    if (!ret) {
        u64 arg[4] = { r->start, PAGE, CONTINUE_DONTWAKE, 0 };
        int tries = 0;
        do
            ret = call3(SYS_ioctl, h->guard, UFFDIO_CONTINUE, (u64)arg);
        while (ret == -EAGAIN && ++tries < 1000);
    }
    if (ret && ret != -EEXIST)
        return ret;
    r->stage = ST_DONE;
    return 0;
}

static i64 map_store(struct header *h, struct record *r)
{
    if (fails(h, ST_MAPPED))
        return -(i64)h->fail_errno;
    i64 ret = call6(SYS_mmap, r->start, r->length, r->prot, MAP_PRIVATE | MAP_FIXED,
                    h->store, r->offset);
    return ret == (i64)r->start ? 0 : ret;
}

/*
 * The run is mapped to the store and a later step has failed: the quarantine, at `aside`, goes home.
 * It equals the store, so a page that differs from it was written meanwhile, by another process.
 */
static void take_along(struct header *h, struct record *r, u64 aside)
{
    u64 fresh = h->fresh + r->aside;
    uffd_unregister(h->guard, r->start, r->length);
    if (uffd_register(h->track, r->start, r->length, MODE_MISSING | MODE_MINOR))
        return;
    i64 ret = call6(SYS_mremap, r->start, r->length, r->length,
                    MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, fresh, 0);
    if (ret != (i64)fresh)
        return;
    for (u64 at = 0; at < r->length; at += PAGE)
        if (differ((u64 *)(fresh + at), (u64 *)(aside + at), PAGE))
            copy((u64 *)(aside + at), (u64 *)(fresh + at), PAGE);
}

/* Move a run aside, see what it holds, and see that nobody can have written to it meanwhile. */
static i64 take_aside(struct header *h, struct record *r, u64 *moved)
{
    u64 aside = h->aside + r->aside, store = h->store_map + (r->offset - h->store_offset);
    i64 ret = inject(h, ST_ASIDE, 0);

    *moved = 0;
    if (!ret)
        ret = move_all(h, aside, r->start, r->length, moved);
    if (ret)
        return ret;
    r->stage = ST_ASIDE;
    ret = r->op == OP_ZERO ? not_zero((u64 *)aside, r->length)
                           : differ((u64 *)aside, (u64 *)store, r->length);
    if (!ret)
        ret = inject(h, ST_EQUAL, 0);
    if (!ret && tracer_dead(h))
        ret = -EOWNERDEAD;
    if (!ret)
        r->stage = ST_EQUAL;
    return ret;
}

/* Anonymous pages to the store. */
static void merge(struct header *h, struct record *r)
{
    u64 aside = h->aside + r->aside, moved;
    i64 ret = inject(h, ST_REGISTERED, 0);

    if (!ret)
        ret = uffd_register(h->track, r->start, r->length, MODE_MISSING);
    if (ret) {
        r->result = ret;
        return;
    }
    r->stage = ST_REGISTERED;
    ret = take_aside(h, r, &moved);
    if (!ret)
        ret = map_store(h, r);
    if (ret) {
        r->result = ret;
        undone(h, r, move_back(h, r, aside, moved, ret), ret);
        uffd_unregister(h->track, r->start, r->length);
        return;
    }
    r->stage = ST_MAPPED;
    ret = fill_and_guard(h, r);
    r->result = ret;
    if (ret) {
        take_along(h, r, aside);
        i64 to = put(h, aside, r->length, r->start);
        undone(h, r, to == (i64)r->start, to);
    }
}

/*
 * Pages of zeros are dropped: an empty anonymous range reads as zeros, nothing needs to be mapped.
 * So the mapping need not be cut up either: from its first record to its last it is registered at
 * once, and given back at once. What was never there in between waits for that too.
 */
static void drop(struct header *h, struct record *r, i64 registered)
{
    u64 moved;
    i64 ret = inject(h, ST_REGISTERED, registered);

    r->result = ret;
    if (ret)
        return;
    r->stage = ST_REGISTERED;
    ret = take_aside(h, r, &moved);
    r->result = ret;
    if (ret)
        undone(h, r, move_back(h, r, h->aside + r->aside, moved, ret), ret);
    else
        r->stage = ST_DONE;
}

/* The end of the last of the records from `r` on that lie in one mapping. */
static u64 end_of_mapping(struct header *h, struct record *r)
{
    struct record *last = (struct record *)h->records + h->nrecords - 1, *at = r;

    while (at < last && at[1].flags >> REC_MAPPING_SHIFT == r->flags >> REC_MAPPING_SHIFT)
        at++;
    while (at > r && at->flags & REC_SKIP)
        at--;
    return at->start + at->length;
}

/* Move a merged run's page table aside; accesses to the run wait in the tracking context. */
static i64 lift(struct header *h, struct record *r, u64 *where)
{
    u64 aside = h->aside + r->aside;
    i64 ret = inject(h, ST_REGISTERED, 0);
    if (ret)
        return ret;
    if (h->track < 0) { /* no contexts: a child that fork made; it is read where it is */
        *where = r->start;
        return 0;
    }
    *where = aside;
    ret = uffd_unregister(h->guard, r->start, r->length);
    if (!ret)
        ret = uffd_register(h->track, r->start, r->length, MODE_MISSING | MODE_MINOR);
    if (ret)
        goto guard;
    r->stage = ST_REGISTERED;
    ret = inject(h, ST_ASIDE, 0);
    if (!ret)
        ret = call6(SYS_mremap, r->start, r->length, r->length,
                    MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, aside, 0);
    if (ret == (i64)aside) {
        r->stage = ST_ASIDE;
        return 0;
    }
    uffd_unregister(h->track, r->start, r->length);
guard:
    if (uffd_register(h->guard, r->start, r->length, MODE_MISSING | MODE_MINOR)) {
        h->error = ret;
        r->stage += STUCK;
    }
    return ret ? ret : -ENOMEM;
}

/* The opposite of lift: the entries go home, and the guard with them. It needs no CONTINUE, which
 * could show store content where the program dropped a page: the VMA brings its anon_vma along. */
static void lower(struct header *h, struct record *r, u64 aside)
{
    if (!(r->prot & PROT_READ))
        call3(SYS_mprotect, aside, r->length, r->prot);
    if (aside == r->start) {
        r->stage += UNDONE;
        return;
    }
    i64 ret = put(h, aside, r->length, r->start);
    int home = ret == (i64)r->start;
    if (home)
        home = !uffd_register(h->guard, r->start, r->length, MODE_MISSING | MODE_MINOR);
    undone(h, r, home, ret);
}

/* Read one pagemap entry per page into `entries`, at most 512 pages at a time. */
static i64 presence(struct header *h, u64 address, u64 npages, u64 *entries)
{
    i64 ret = call6(SYS_pread64, h->pagemap, (u64)entries, npages * 8, address / PAGE * 8, 0, 0);
    return ret == (i64)(npages * 8) ? 0 : failed(ret) ? ret : -ENODATA;
}

/* While the guard stands: pages that the program dropped become zeros that are there. */
static i64 fill_dropped(struct header *h, struct record *r)
{
    u64 entries[512];
    i64 ret = 0;

    for (u64 at = 0; at < r->length && !ret; at += PAGE) {
        u64 left = (r->length - at) / PAGE, slot = at / PAGE % 512;
        if (slot == 0)
            ret = presence(h, r->start + at, left < 512 ? left : 512, entries);
        if (ret || entries[slot] & (PM_PRESENT | PM_SWAPPED | PM_GUARD))
            continue;
        u64 arg[4] = { r->start + at, PAGE, 0, 0 };
        int tries = 0;
        do
            ret = call3(SYS_ioctl, h->guard, UFFDIO_ZEROPAGE, (u64)arg);
        while (ret == -EAGAIN && ++tries < 1000);
        if (ret == -EEXIST)
            ret = 0; /* the pager was first */
    }
    return ret;
}

/*
 * What the program has said of a merged range since, said of its new memory, at `fresh`. Nothing but
 * a call that locked memory refuses shows here that the range is locked; it is made for one page,
 * and where it succeeds that page has only lost some favour with reclaim.
 */
static int locked(u64 address)
{
    return call3(SYS_madvise, address, PAGE, MADV_COLD) == -EINVAL;
}
static i64 say_again(struct record *r, u64 fresh, u64 aside, int lock)
{
    i64 ret = 0;

    say_of_huge_pages(r, fresh);
    if (r->flags & REC_DONTFORK)
        ret = call3(SYS_madvise, fresh, r->length, MADV_DONTFORK);
    if (!ret && r->flags & REC_DONTDUMP)
        ret = call3(SYS_madvise, fresh, r->length, MADV_DONTDUMP);
    if (ret || !lock)
        return ret;
    /* RLIMIT_MEMLOCK need have room for one of the two only. mlock also fails where it cannot bring
       in a page, a guard page say, and has locked the range all the same. */
    call3(RARE_munlock, aside, r->length, 0);
    ret = call3(RARE_mlock, fresh, r->length, 0);
    if (!ret || locked(fresh))
        return 0;
    call3(RARE_mlock, aside, r->length, 0);
    return ret;
}

/* Every page of the run becomes anonymous memory of its own; the content stays. */
static void unmerge(struct header *h, struct record *r)
{
    u64 aside, fresh = h->fresh + r->aside, entries[512];
    int lock = locked(r->start);
    i64 ret = h->track < 0 ? 0 : fill_dropped(h, r);

    if (!ret)
        ret = lift(h, r, &aside);
    if (ret) {
        r->result = ret;
        return;
    }
    if (!(r->prot & PROT_READ)) {
        ret = call3(SYS_mprotect, aside, r->length, PROT_READ);
        if (ret)
            goto home;
    }
    for (u64 at = 0; at < r->length; at += PAGE) {
        u64 left = (r->length - at) / PAGE, slot = at / PAGE % 512;
        if (slot == 0) {
            ret = presence(h, aside + at, left < 512 ? left : 512, entries);
            if (ret)
                goto home;
        }
        if (entries[slot] & PM_GUARD) {
            ret = call3(SYS_madvise, fresh + at, PAGE, MADV_GUARD_INSTALL);
            if (ret)
                goto home;
            continue;
        }
        if (!(entries[slot] & (PM_PRESENT | PM_SWAPPED)))
            continue; /* dropped by the program: zeros */
        if (not_zero((u64 *)(aside + at), PAGE))
            copy((u64 *)(fresh + at), (u64 *)(aside + at), PAGE);
    }
    ret = inject(h, ST_EQUAL, 0);
    if (ret)
        goto home;
    r->stage = ST_EQUAL;
    ret = say_again(r, fresh, aside, lock);
    if (ret)
        goto home;
    if (r->prot != PROT_RW) {
        ret = call3(SYS_mprotect, fresh, r->length, r->prot);
        if (ret)
            goto home;
    }
    ret = inject(h, ST_MAPPED, 0);
    if (ret)
        goto home;
    ret = put(h, fresh, r->length, r->start);
    if (ret != (i64)r->start)
        goto home;
    r->stage = ST_DONE;
    r->result = 0;
    return;
home:
    r->result = ret;
    lower(h, r, aside);
}

/* 0 where every page of the run is one of its own, which no access makes any less. */
static i64 all_broken(struct header *h, struct record *r)
{
    u64 entries[512];

    for (u64 at = 0; at < r->length; at += PAGE) {
        u64 left = (r->length - at) / PAGE, slot = at / PAGE % 512;
        if (slot == 0) {
            i64 ret = presence(h, r->start + at, left < 512 ? left : 512, entries);
            if (ret)
                return ret;
        }
        if (!(entries[slot] & PM_PRESENT) || (entries[slot] & PM_FILE))
            return 1;
    }
    return 0;
}

/* Pages that were written after a merge and hold the store's content again go back to the store. */
static void remerge(struct header *h, struct record *r)
{
    u64 aside;
    u64 store = h->store_map + (r->offset - h->store_offset);
    i64 ret = locked(r->start) ? 1 : all_broken(h, r);

    if (!ret)
        ret = lift(h, r, &aside);
    if (ret) {
        r->result = ret;
        return;
    }
    ret = differ((u64 *)aside, (u64 *)store, r->length);
    if (!ret)
        ret = inject(h, ST_EQUAL, 0);
    if (!ret && tracer_dead(h))
        ret = -EOWNERDEAD;
    if (ret)
        goto home;
    r->stage = ST_EQUAL;
    ret = map_store(h, r);
    if (ret)
        goto home;
    r->stage = ST_MAPPED;
    ret = fill_and_guard(h, r);
    if (ret) {
        take_along(h, r, aside);
        goto home;
    }
    r->result = 0;
    return;
home:
    r->result = ret;
    lower(h, r, aside);
}

/* Records of one window are all of one kind. */
INLINE int lifts(struct header *h)
{
    return ((struct record *)h->records)->op >= OP_UNMERGE;
}

/*
 * Whether the two pages at `start` are one mapping's: a mremap that cannot be done says ENOMEM (2^46
 * bytes are too many; EAGAIN where they are locked), and EFAULT where the range has two mappings.
 */
static int one_mapping(u64 start)
{
    i64 ret = call6(SYS_mremap, start, 2 * PAGE, 1UL << 46, 0, 0, 0);
    return ret == -ENOMEM || ret == -EAGAIN;
}

/*
 * Whether advice was given to the mapping that holds the two pages at `start`; the opposite is the
 * next number. Where the first page cannot be cut off, for want of room, the flag was set, too.
 */
static int advised(u64 start, u64 advice)
{
    if (call3(SYS_madvise, start, PAGE, advice + 1))
        return 1;
    if (one_mapping(start))
        return 0;
    call3(SYS_madvise, start, PAGE, advice);
    return 1;
}

static void try_flags(struct header *h)
{
    u64 *trial = (u64 *)h->trials;

    for (u64 i = 0; i < h->ntrials && !tracer_dead(h); i++) {
        u64 at = trial[i];
        trial[i] = REC_UNTRIED;
        if (!one_mapping(at)) /* it is sealed, say */
            continue;
        trial[i] = advised(at, MADV_DONTFORK) ? REC_DONTFORK : 0;
        if (advised(at, MADV_DONTDUMP))
            trial[i] |= REC_DONTDUMP;
        if (!lifts(h) && advised(at, MADV_WIPEONFORK))
            trial[i] |= REC_WIPEONFORK;
    }
}

/* What is known now of the flags of a record's mapping, in place of what the daemon read before. */
static void know_flags(struct header *h, struct record *r)
{
    u64 number = r->flags >> REC_MAPPING_SHIFT;
    u64 found = number ? ((u64 *)h->trials)[number - 1] : REC_UNTRIED;

    r->flags &= (1 << REC_MAPPING_SHIFT) - 1;
    if (found != REC_UNTRIED)
        r->flags = (u32)found | (r->flags & REC_HARMLESS);
    else if (number && r->op == OP_MERGE)
        r->flags = REC_UNTRIED;
}

static void mark(struct header *h, u64 phase)
{
    h->phase = phase;
    call3(SYS_tgkill, h->pid, h->tid, h->marker);
}

/* Room in the descriptor table for the length of the window, within the hard limit. */
static void raise_rlimit(struct header *h)
{
    u64 old[2], new[2];
    if (call6(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, (u64)old, 0, 0) || old[0] >= old[1])
        return;
    h->rlimit_soft = old[0];
    h->rlimit_hard = old[1];
    new[0] = old[1] - old[0] < 16 ? old[1] : old[0] + 16;
    new[1] = old[1];
    h->rlimit_raised = !call6(SYS_prlimit64, 0, RLIMIT_NOFILE, (u64)new, 0, 0, 0);
}

/* Take the descriptors that the tracer queued on our own socket. */
static i64 receive(struct header *h)
{
    i64 *into[5] = { &h->alive_fd, &h->track, &h->guard, &h->store, &h->pagemap };
    i64 *bare[2] = { &h->alive_fd, &h->pagemap };
    i64 got = call3(SYS_recvmsg, h->socket, (u64)h->msghdr, RECV_FLAGS);
    /* on EAGAIN msg_controllen still holds what went in: look only after a message; and count by
       cmsg_len, for msg_controllen is rounded up and would name a descriptor that is none of ours */
    u64 there = got == 1 ? *(u64 *)(h->msghdr + 40) : 0;
    u64 length = there >= 20 ? *(u64 *)h->control : 0, n = length >= 20 ? (length - 16) / 4 : 0;
    u32 flags = *(u32 *)(h->msghdr + 48);
    if (h->mode == MODE_SETUP)
        into[0] = &h->device;
    else if (lifts(h)) { /* giving pages back needs no store */
        into[3] = &h->pagemap;
        into[4] = &h->store;
    }
    for (u64 i = 0; i < n && i < 5; i++)
        *(h->nfds == 2 ? bare : into)[i] = ((i32 *)(h->control + 16))[i];
    if (got != 1)
        return failed(got) ? got : -ENODATA;
    return (flags & MSG_CTRUNC) || n < h->nfds ? -EMFILE : 0;
}

INLINE i64 reserve(u64 length, u64 prot, u64 *where)
{
    /* 2 MiB more, so that a run may lie congruent with its quarantine and keep huge pages whole */
    i64 got = call6(SYS_mmap, 0, length + (2UL << 20), prot, MAP_ANON_NORESERVE, -1, 0);
    if (failed(got))
        return got;
    *where = ((u64)got + (2UL << 20) - 1) & ~((2UL << 20) - 1);
    u64 head = *where - (u64)got;
    if (head)
        call3(SYS_munmap, got, head, 0);
    if (head < 2UL << 20)
        call3(SYS_munmap, *where + length, (2UL << 20) - head, 0);
    return 0;
}

static i64 prepare(struct header *h)
{
    i64 ret = call6(SYS_mmap, 0, PAGE, PROT_READ, MAP_SHARED, h->alive_fd, 0);
    if (failed(ret))
        return ret;
    h->alive_map = ret;
    if (h->store_len) {
        ret = call6(SYS_mmap, 0, h->store_len, PROT_READ, MAP_SHARED, h->store, h->store_offset);
        if (failed(ret))
            return ret;
        h->store_map = ret;
    }
    ret = reserve(h->aside_len, lifts(h) ? PROT_NONE : PROT_RW, &h->aside);
    if (!ret && !lifts(h))
        ret = uffd_register(h->track, h->aside, h->aside_len, MODE_MISSING);
    if (!ret && h->fresh_len)
        ret = reserve(h->fresh_len, PROT_RW, &h->fresh);
    return ret ? ret : make_spares(h);
}

static void clean_up(struct header *h)
{
    i64 fds[] = { h->alive_fd, h->track, h->guard, h->store, h->pagemap, h->device, h->socket };
    if (h->track >= 0 && h->wake_len) {
        u64 arg[2] = { h->wake_start, h->wake_len };
        call3(SYS_ioctl, h->track, UFFDIO_WAKE, (u64)arg);
    }
    if (h->aside && !h->keep)
        call3(SYS_munmap, h->aside, h->aside_len, 0);
    if (h->fresh)
        call3(SYS_munmap, h->fresh, h->fresh_len, 0);
    drop_spares(h);
    if (h->store_map)
        call3(SYS_munmap, h->store_map, h->store_len, 0);
    if (h->alive_map)
        call3(SYS_munmap, h->alive_map, PAGE, 0);
    for (u64 i = 0; i < sizeof fds / sizeof *fds; i++)
        if (fds[i] >= 0)
            call3(SYS_close, fds[i], 0, 0);
    if (h->rlimit_raised) {
        u64 old[2] = { h->rlimit_soft, h->rlimit_hard };
        call6(SYS_prlimit64, 0, RLIMIT_NOFILE, (u64)old, 0, 0, 0);
    }
}

static void carry_out(struct header *h)
{
    struct record *r = (struct record *)h->records;
    u64 step = h->fail_step, held = 0, held_end = 0;
    i64 registered = 0;

    try_flags(h);
    for (u64 i = 0; i < h->nrecords && !h->error; i++, r++) {
        if (r->flags & REC_SKIP)
            continue;
        if (tracer_dead(h)) {
            r->result = -EOWNERDEAD;
            continue;
        }
        if (!h->spare) {
            r->result = -ENOMEM;
            continue;
        }
        h->fail_step = h->fail_record == i ? step : 0;
        if (r->op == OP_ZERO && r->start >= held_end) {
            if (held_end > held && !registered)
                uffd_unregister(h->track, held, held_end - held);
            held = r->start;
            held_end = end_of_mapping(h, r);
            registered = uffd_register(h->track, held, held_end - held, MODE_MISSING);
        }
        if (r->op != OP_ZERO)
            know_flags(h, r);
        if (r->op == OP_MERGE && r->flags & ~REC_HARMLESS) {
            r->result = -(i64)(RES_FLAGGED + (r->flags & ~REC_HARMLESS));
            continue;
        }
        switch (r->op) {
        case OP_MERGE:
            merge(h, r);
            break;
        case OP_ZERO:
            drop(h, r, registered);
            break;
        case OP_UNMERGE:
            unmerge(h, r);
            break;
        default:
            remerge(h, r);
        }
    }
    if (held_end > held && !registered)
        uffd_unregister(h->track, held, held_end - held);
}

/* The contexts come from the target's own ioctl; the tracer takes them and we close ours. */
static void setup(struct header *h)
{
    h->guard = call3(SYS_ioctl, h->device, USERFAULTFD_IOC_NEW, O_CLOEXEC_NONBLOCK);
    h->track = call3(SYS_ioctl, h->device, USERFAULTFD_IOC_NEW, O_CLOEXEC_NONBLOCK);
    h->error = h->guard < 0 ? h->guard : h->track < 0 ? h->track : 0;
    mark(h, 2);
}

__attribute__((used)) void stub_main(struct header *h)
{
    h->socket = h->alive_fd = h->track = h->guard = h->store = h->pagemap = h->device = -1;
    raise_rlimit(h);
    h->socket = call3(SYS_socket, AF_UNIX, SOCK_DGRAM_CLOEXEC, 0);
    h->error = h->socket < 0 ? h->socket : 0;
    mark(h, 1); /* the tracer takes the socket by pidfd_getfd and queues the descriptors */
    if (!h->error)
        h->error = receive(h);
    if (!h->error && h->mode == MODE_SETUP)
        setup(h);
    else if (!h->error) {
        h->error = prepare(h);
        if (!h->error)
            carry_out(h);
    }
    clean_up(h);
    h->done = 1;
    mark(h, 3);
}

/*
 * Entry: rbx = header, rsp = end of the scratch stack, and in rax, rdi, rsi, rdx the call that makes
 * header, stack and records writable: they lie in one mapping with this code, and until now it was
 * all executable and nothing could be written. Where that fails the tracer hears of it by a marker
 * that comes before the first phase. Tail: munmap(scratch) through the target's own `syscall; ret`,
 * with rsp at the frame; the ret goes to the restorer, which does rt_sigreturn.
 */
asm(".section .text.start,\"ax\"\n"
    ".globl _start\n"
    "_start:\n"
    "    cld\n"
    "    syscall\n"
    "    mov %rbx,%rdi\n"
    "    test %eax,%eax\n"
    "    jnz 1f\n"
    "    push %rdi\n"
    "    call stub_main\n"
    "    pop %rdi\n"
    "2:  mov 96(%rdi),%rcx\n"   /* gadget */
    "    mov 104(%rdi),%r10\n"  /* frame */
    "    mov 120(%rdi),%rsi\n"  /* scratch_len */
    "    mov 112(%rdi),%rdi\n"  /* scratch */
    "    mov $11,%eax\n"        /* munmap */
    "    mov %r10,%rsp\n"
    "    jmp *%rcx\n"
    "1:  mov 88(%rbx),%rdx\n"   /* marker */
    "    mov 200(%rbx),%rdi\n"  /* pid */
    "    mov 208(%rbx),%rsi\n"  /* tid */
    "    mov $234,%eax\n"       /* tgkill */
    "    syscall\n"
    "    mov %rbx,%rdi\n"
    "    jmp 2b\n"
    ".text\n");
