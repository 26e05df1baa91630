/*
 * ksmd.h - let ksmd share memory of this process with equal memory of others.
 *
 * One file, no library: include it and call. It speaks the daemon's control socket (Varlink: JSON
 * messages ended by NUL), needs no privilege, only a socket that lets the program in, and has no
 * global state. C99 or C++ with POSIX; one struct ksmd is for one thread at a time.
 *
 *	struct ksmd ksmd;
 *	struct ksmd_counts counts;
 *	long sma;
 *
 *	if (ksmd_open(&ksmd, NULL) == 0) {
 *		sma = ksmd_create_area(&ksmd);
 *		ksmd_register(&ksmd, sma, table, size);
 *		ksmd_share(&ksmd, sma, &counts);
 *	}
 *	...
 *	ksmd_close(&ksmd);
 *
 * Nothing changes for the program: a page that it writes to becomes its own again. All of it becomes
 * its own again when the area is removed or closed, or the process ends. Calls return 0 or more, or
 * -errno; ksmd_error() says then what the daemon said.
 *
 * SPDX-License-Identifier: GPL-2.0-only
 */
#ifndef KSMD_H
#define KSMD_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define KSMD_DEFAULT_SOCKET "/run/ksmd/ksmd.sock"
#define KSMD_INTERFACE "org.ksmd.Control"
#define KSMD_MAX_REPLY (1u << 20)

struct ksmd {
	int fd;
	size_t size;     /* bytes that reply can hold */
	char *reply;     /* the last one, ended by NUL */
	char error[200]; /* what was wrong with the last call, "" for nothing */
};

/* What a scan did, in pages. */
struct ksmd_counts {
	long scanned;
	long merged;
};

/* -- reading JSON: as much of it as replies need ---------------------------------------------- */

static const char *ksmd__string_end(const char *at)
{
	for (at++; *at && *at != '"'; at++)
		if (*at == '\\' && at[1])
			at++;
	return *at ? at + 1 : at;
}

/* The end of the value that starts at *at. */
static const char *ksmd__value_end(const char *at)
{
	int depth = 0;

	do {
		if (*at == '"') {
			at = ksmd__string_end(at);
			continue;
		}
		if (*at == '{' || *at == '[')
			depth++;
		else if (*at == '}' || *at == ']')
			depth--;
		else if (*at == ',' && depth == 0)
			break;
		if (depth < 0 || !*at)
			break;
		at++;
	} while (*at && (depth > 0 || (*at != ',' && *at != '}' && *at != ']')));
	return at;
}

static const char *ksmd__space(const char *at)
{
	while (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r')
		at++;
	return at;
}

/* The value of a member of the object that starts at *object, NULL when it has none of that name. */
static const char *ksmd__member(const char *object, const char *name)
{
	size_t length = strlen(name);
	const char *at = object ? ksmd__space(object) : NULL;

	if (!at || *at != '{')
		return NULL;
	at = ksmd__space(at + 1);
	while (*at == '"') {
		const char *key = at + 1, *end = ksmd__string_end(at);
		int found = (size_t)(end - key) == length + 1 && !strncmp(key, name, length);

		at = ksmd__space(end);
		if (*at != ':')
			return NULL;
		at = ksmd__space(at + 1);
		if (found)
			return at;
		at = ksmd__space(ksmd__value_end(at));
		if (*at == ',')
			at = ksmd__space(at + 1);
	}
	return NULL;
}

static long ksmd__number(const char *object, const char *name)
{
	const char *value = ksmd__member(object, name);

	return value ? strtol(value, NULL, 10) : -1;
}

/* Copy a string value without undoing its escapes: it is for people to read. */
static void ksmd__text(const char *value, char *to, size_t size)
{
	size_t length = 0;

	if (value && *value == '"') {
		length = (size_t)(ksmd__string_end(value) - value);
		length = length < 2 ? 0 : length - 2;
		if (length >= size)
			length = size - 1;
		memcpy(to, value + 1, length);
	}
	to[length] = '\0';
}

/* -- calling ------------------------------------------------------------------------------------ */

static int ksmd__failed(struct ksmd *ksmd, int number, const char *what)
{
	snprintf(ksmd->error, sizeof(ksmd->error), "%s: %s", what, strerror(number));
	return -number;
}

static int ksmd__send(struct ksmd *ksmd, const char *data, size_t length)
{
	while (length) {
		ssize_t sent = send(ksmd->fd, data, length, MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && (errno == EPIPE || errno == ECONNRESET))
			return 0; /* turned away: the reply says why */
		if (sent < 0)
			return ksmd__failed(ksmd, errno, "send");
		data += sent;
		length -= (size_t)sent;
	}
	return 0;
}

static int ksmd__receive(struct ksmd *ksmd)
{
	size_t have = 0;

	for (;;) {
		ssize_t got;

		if (have == ksmd->size) {
			size_t size = ksmd->size ? 2 * ksmd->size : 4096;
			char *more;

			if (size > KSMD_MAX_REPLY)
				return ksmd__failed(ksmd, EMSGSIZE, "reply");
			more = (char *)realloc(ksmd->reply, size);
			if (!more)
				return ksmd__failed(ksmd, ENOMEM, "reply");
			ksmd->reply = more;
			ksmd->size = size;
		}
		got = recv(ksmd->fd, ksmd->reply + have, ksmd->size - have, 0);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return ksmd__failed(ksmd, errno, "receive");
		if (got == 0)
			return ksmd__failed(ksmd, ECONNRESET, "ksmd closed the connection");
		have += (size_t)got;
		if (ksmd->reply[have - 1] == '\0')
			return 0; /* one call at a time: nothing follows its reply */
	}
}

/* The errno for an error of the daemon. */
static int ksmd__number_of(const char *name)
{
	static const struct {
		const char *name;
		int number;
	} known[] = {
		{ "PermissionDenied", EPERM },     { "NothingRegistered", EAGAIN },
		{ "InvalidRegion", EINVAL },       { "InvalidParameter", EINVAL },
		{ "NoSuchArea", ENOENT },          { "NoSuchScan", ENOENT },
		{ "LimitReached", ENOSPC },        { "TooManyConnections", EUSERS },
		{ "RateLimited", EBUSY },          { "TargetGone", ESRCH },
	};
	const char *dot = strrchr(name, '.');
	size_t at;

	for (at = 0; at < sizeof(known) / sizeof(known[0]); at++)
		if (!strcmp(dot ? dot + 1 : name, known[at].name))
			return known[at].number;
	return EIO;
}

/* Call a method; *parameters is a JSON object. The reply's parameters lie in *answer then. */
static int ksmd__call(struct ksmd *ksmd, const char *method, const char *parameters,
		      const char **answer)
{
	char message[512], name[100];
	const char *error;
	int length, failed;

	ksmd->error[0] = '\0';
	length = snprintf(message, sizeof(message), "{\"method\":\"" KSMD_INTERFACE ".%s\","
			  "\"parameters\":%s}", method, parameters);
	if (length < 0 || (size_t)length >= sizeof(message))
		return ksmd__failed(ksmd, EMSGSIZE, method);
	failed = ksmd__send(ksmd, message, (size_t)length + 1); /* with its NUL */
	if (!failed)
		failed = ksmd__receive(ksmd);
	if (failed)
		return failed;
	*answer = ksmd__member(ksmd->reply, "parameters");
	error = ksmd__member(ksmd->reply, "error");
	if (error) {
		ksmd__text(error, name, sizeof(name));
		ksmd__text(ksmd__member(*answer, "message"), ksmd->error, sizeof(ksmd->error));
		if (!ksmd->error[0])
			snprintf(ksmd->error, sizeof(ksmd->error), "%s", name);
		return -ksmd__number_of(name);
	}
	return 0;
}

static int ksmd__counts(struct ksmd *ksmd, const char *method, const char *parameters,
			struct ksmd_counts *counts)
{
	const char *answer = NULL;
	int failed = ksmd__call(ksmd, method, parameters, &answer);

	if (counts) {
		counts->scanned = failed ? 0 : ksmd__number(answer, "scanned");
		counts->merged = failed ? 0 : ksmd__number(answer, "merged");
	}
	return failed;
}

/* -- what programs use ---------------------------------------------------------------------------- */

/* Connect to the daemon at *path (NULL: where it listens by default). */
static inline int ksmd_open(struct ksmd *ksmd, const char *path)
{
	struct sockaddr_un address;

	memset(ksmd, 0, sizeof(*ksmd));
	memset(&address, 0, sizeof(address));
	ksmd->fd = -1;
	path = path ? path : KSMD_DEFAULT_SOCKET;
	if (strlen(path) >= sizeof(address.sun_path))
		return ksmd__failed(ksmd, ENAMETOOLONG, path);
	address.sun_family = AF_UNIX;
	strcpy(address.sun_path, path);
	ksmd->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (ksmd->fd < 0)
		return ksmd__failed(ksmd, errno, "socket");
	while (connect(ksmd->fd, (const struct sockaddr *)&address, sizeof(address)) < 0) {
		int number = errno;

		if (number == EINTR)
			continue; /* it waited for room in the daemon's queue */
		close(ksmd->fd);
		ksmd->fd = -1;
		return ksmd__failed(ksmd, number, path);
	}
	return 0;
}

/* End the connection: all that was registered over it becomes this process's own again. */
static inline void ksmd_close(struct ksmd *ksmd)
{
	if (ksmd->fd >= 0)
		close(ksmd->fd);
	free(ksmd->reply);
	memset(ksmd, 0, sizeof(*ksmd));
	ksmd->fd = -1;
}

/* What was wrong with the last call that failed. */
static inline const char *ksmd_error(const struct ksmd *ksmd)
{
	return ksmd->error;
}

/* Make a shared memory area; its number. */
static inline long ksmd_create_area(struct ksmd *ksmd)
{
	const char *answer = NULL;
	int failed = ksmd__call(ksmd, "CreateSharedMemoryArea", "{}", &answer);

	return failed ? failed : ksmd__number(answer, "sma");
}

/* Register the whole pages inside [data, data + length), private anonymous memory; their number. */
static inline long ksmd_register(struct ksmd *ksmd, long area, const void *data, size_t length)
{
	uintptr_t page = 4096, start = ((uintptr_t)data + page - 1) & ~(page - 1);
	uintptr_t end = ((uintptr_t)data + length) & ~(page - 1);
	const char *answer = NULL;
	char parameters[160];
	int failed;

	if (start >= end) {
		ksmd->error[0] = '\0';
		return ksmd__failed(ksmd, EINVAL, "no whole page");
	}
	snprintf(parameters, sizeof(parameters), "{\"sma\":%ld,\"addr\":%llu,\"npages\":%llu}", area,
		 (unsigned long long)start, (unsigned long long)((end - start) / page));
	failed = ksmd__call(ksmd, "RegisterMemoryRegion", parameters, &answer);
	return failed ? failed : (long)((end - start) / page);
}

/* Forget all regions of an area, and wait until their memory is this process's own again. */
static inline int ksmd_remove(struct ksmd *ksmd, long area)
{
	const char *answer = NULL;
	char parameters[80];

	snprintf(parameters, sizeof(parameters), "{\"sma\":%ld,\"wait\":true}", area);
	return ksmd__call(ksmd, "RemoveMemoryRegion", parameters, &answer);
}

/* Share an area now, as far as its pages are equal to others that ksmd has seen. */
static inline int ksmd_share(struct ksmd *ksmd, long area, struct ksmd_counts *counts)
{
	char parameters[80];

	snprintf(parameters, sizeof(parameters), "{\"sma\":%ld}", area);
	return ksmd__counts(ksmd, "Share", parameters, counts);
}

/* Make a scanner, which covers all areas of this connection; its number. */
static inline long ksmd_create_scan(struct ksmd *ksmd)
{
	const char *answer = NULL;
	int failed = ksmd__call(ksmd, "CreateScan", "{}", &answer);

	return failed ? failed : ksmd__number(answer, "scan");
}

/* Walk on with a scanner over so many pages, merging at most so many; -EAGAIN: nothing to scan. */
static inline int ksmd_scan(struct ksmd *ksmd, long scan, unsigned pages_to_scan,
			    unsigned max_pages_to_merge, struct ksmd_counts *counts)
{
	char parameters[160];

	snprintf(parameters, sizeof(parameters),
		 "{\"scan\":%ld,\"pages_to_scan\":%u,\"max_pages_to_merge\":%u}", scan,
		 pages_to_scan, max_pages_to_merge);
	return ksmd__counts(ksmd, "Scan", parameters, counts);
}

#endif
