/* The processes that work on the hammer's arena from outside; part of hammer.c. */
#ifndef FOREIGN_H
#define FOREIGN_H

static int through_mem = -1;

static long reach(int write, void *ours, uint64_t theirs, size_t length)
{
	struct iovec local = { ours, length }, remote = { (void *)theirs, length };

	if (through_mem < 0)
		return write ? process_vm_writev(victim, &local, 1, &remote, 1, 0)
			     : process_vm_readv(victim, &local, 1, &remote, 1, 0);
	for (;;) {
		long got = write ? pwrite(through_mem, ours, length, (off_t)theirs)
				 : pread(through_mem, ours, length, (off_t)theirs);
		if (got >= 0 || errno != EIO)
			return got;
		/* the kernel does not let these wait for a page in quarantine: told, not lost */
		ctl[FAILED + MEMWRITE]++;
		pause_us(20);
	}
}

static uint64_t peek(int actor, uint64_t at)
{
	uint64_t value = 0;

	expect(actor, reach(0, &value, at, 8) == 8);
	return value;
}

static void foreign_writer(int actor)
{
	uint64_t state = (uint64_t)actor * 31;

	while (!ctl[QUIT]) {
		if (!enter(actor))
			continue;
		long page = choose(&state, -1);
		uint64_t at = (uint64_t)word_at(page, 8 + actor);
		uint64_t was = base(page, 8 + actor), other = next(&state) << 8 | 9;

		expect(actor, peek(actor, at) == was);
		expect(actor, reach(1, &other, at, 8) == 8);
		expect(actor, peek(actor, at) == other);
		expect(actor, reach(1, &was, at, 8) == 8);
		expect(actor, peek(actor, at) == was);
		ctl[DONE + actor] += 2;
		leave(actor);
		if (next(&state) % 4 == 0)
			pause_us(20);
	}
}

static void foreign_reader(void)
{
	static uint64_t buffer[4 * WORDS];
	uint64_t state = 99;

	while (!ctl[QUIT]) {
		if (!enter(VMREAD))
			continue;
		long page = choose(&state, -1) & ~3L;

		expect(VMREAD, reach(0, buffer, (uint64_t)word_at(page, 0), sizeof(buffer)) == sizeof(buffer));
		for (long p = page; p < page + 4; p++)
			for (int k = 17; k < WORDS / 2; k += 41)
				expect(VMREAD, !of_all(p) || buffer[(p - page) * WORDS + k] == base(p, k));
		ctl[DONE + VMREAD] += 4;
		leave(VMREAD);
		pause_us(30);
	}
}

static void start_foreigner(int actor)
{
	pid_t parent = getpid();

	if (fork())
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(1);
	munmap((void *)ARENA, (size_t)pages * PAGE);
	while (!ctl[READY])
		pause_us(1000);
	if (actor == MEMWRITE) {
		char path[64];

		snprintf(path, sizeof(path), "/proc/%d/mem", victim);
		through_mem = open(path, O_RDWR);
		must(through_mem >= 0, path);
	}
	if (actor == VMREAD)
		foreign_reader();
	else
		foreign_writer(actor);
	_exit(0);
}

static void start_foreigners(const char *actors)
{
	if (strchr(actors, 'v')) start_foreigner(VMWRITE);
	if (strchr(actors, 'm')) start_foreigner(MEMWRITE);
	if (strchr(actors, 'r')) start_foreigner(VMREAD);
}

#endif
