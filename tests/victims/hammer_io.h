/* Reads by device into the hammer's arena: libaio with O_DIRECT, io_uring with fixed buffers. */
#ifndef HAMMER_IO_H
#define HAMMER_IO_H

/* What block b of the file holds in word k. */
static uint64_t block(uint64_t b, int k) { return 0xD000000000000000UL + b * WORDS + (uint64_t)k; }

/* The second half of a page was read from block b: look, then put the base back. */
static void taken(int actor, long page, uint64_t b)
{
	int good = 1;

	for (int k = 256; k < WORDS; k++)
		good &= *word_at(page, k) == block(b, k - 256);
	expect(actor, good);
	for (int k = 256; k < WORDS; k++)
		*word_at(page, k) = base(page, k);
	ctl[DONE + actor]++;
}

static void *aio_reader(void *arg)
{
	int fd = open(file, O_RDONLY | O_DIRECT);
	aio_context_t context = 0;
	uint64_t state = 5;

	(void)arg;
	must(fd >= 0, "open O_DIRECT");
	must(syscall(SYS_io_setup, 8, &context) == 0, "io_setup");
	while (!ctl[QUIT]) {
		pause_us(200);
		if (!enter(AIO))
			continue;
		long page = choose(&state, 14);
		uint64_t b = next(&state) % FILE_BLOCKS;
		struct iocb request = {
			.aio_fildes = (uint32_t)fd, .aio_lio_opcode = IOCB_CMD_PREAD,
			.aio_buf = (uint64_t)word_at(page, 256), .aio_nbytes = 2048,
			.aio_offset = (int64_t)(b * PAGE),
		}, *list = &request;
		struct io_event event;
		long got;

		must(syscall(SYS_io_submit, context, 1, &list) == 1, "io_submit");
		do
			got = syscall(SYS_io_getevents, context, 1, 1, &event, NULL);
		while (got < 0 && errno == EINTR);
		must(got == 1 && event.res == 2048, "io_getevents");
		taken(AIO, page, b);
		leave(AIO);
	}
	return NULL;
}

static struct {
	int fd;
	volatile unsigned *tail, *mask, *array, *head, *cq_head, *cq_tail, *cq_mask;
	struct io_uring_sqe *entries;
	struct io_uring_cqe *events;
} ring;

static void make_ring(void)
{
	struct io_uring_params p = { 0 };
	struct iovec buffers[64];
	long count = 0;

	ring.fd = (int)syscall(SYS_io_uring_setup, 8, &p);
	must(ring.fd >= 0, "io_uring_setup");
	char *sq = mmap(NULL, p.sq_off.array + p.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED,
			ring.fd, IORING_OFF_SQ_RING);
	char *cq = mmap(NULL, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe),
			PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd, IORING_OFF_CQ_RING);
	ring.entries = mmap(NULL, p.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE,
			    MAP_SHARED, ring.fd, IORING_OFF_SQES);
	must(sq != MAP_FAILED && cq != MAP_FAILED && ring.entries != MAP_FAILED, "mmap of the ring");
	ring.tail = (void *)(sq + p.sq_off.tail);
	ring.mask = (void *)(sq + p.sq_off.ring_mask);
	ring.array = (void *)(sq + p.sq_off.array);
	ring.cq_head = (void *)(cq + p.cq_off.head);
	ring.cq_tail = (void *)(cq + p.cq_off.tail);
	ring.cq_mask = (void *)(cq + p.cq_off.ring_mask);
	ring.events = (void *)(cq + p.cq_off.cqes);
	for (long page = 15; page < pages && count < 64; page += 16)
		buffers[count++] = (struct iovec){ (void *)word_at(page, 0), PAGE };
	must(syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, buffers, count) == 0,
	     "IORING_REGISTER_BUFFERS");
}

static void *uring_reader(void *arg)
{
	int fd = open(file, O_RDONLY);
	uint64_t state = 9;

	(void)arg;
	must(fd >= 0, "open");
	make_ring();
	while (!ctl[QUIT]) {
		pause_us(200);
		if (!enter(URING))
			continue;
		long page = choose(&state, 15);
		uint64_t b = next(&state) % FILE_BLOCKS;
		unsigned at = *ring.tail & *ring.mask;

		ring.entries[at] = (struct io_uring_sqe){
			.opcode = IORING_OP_READ_FIXED, .flags = IOSQE_ASYNC, .fd = fd, .off = b * PAGE,
			.addr = (uint64_t)word_at(page, 256), .len = 2048, .buf_index = (uint16_t)(page / 16),
		};
		ring.array[at] = at;
		__atomic_store_n(ring.tail, *ring.tail + 1, __ATOMIC_RELEASE);
		must(syscall(SYS_io_uring_enter, ring.fd, 1, 0, 0, NULL, 0) == 1, "io_uring_enter");
		while (__atomic_load_n(ring.cq_tail, __ATOMIC_ACQUIRE) == *ring.cq_head)
			pause_us(10);
		must(ring.events[*ring.cq_head & *ring.cq_mask].res == 2048, "a read of the ring");
		__atomic_store_n(ring.cq_head, *ring.cq_head + 1, __ATOMIC_RELEASE);
		taken(URING, page, b);
		leave(URING);
	}
	return NULL;
}

#endif
