/*
 * The hard cases of getting into a process: another user, no room for file descriptors, namespaces
 * of its own without /proc, a seccomp filter that kills.
 */
#ifndef CONFINE_H
#define CONFINE_H

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "work.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* New pid, mount and network namespaces, /proc gone. Returns in the new process only. */
static void enter_namespaces(void)
{
	int status, told[2];
	pid_t child;
	char nothing;

	must(unshare(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET) == 0 && pipe(told) == 0, "unshare");
	must((child = fork()) >= 0, "fork");
	if (child) { /* tells the pid as seen from outside, then waits in the victim's stead */
		printf("pid %d\n", child);
		fflush(stdout);
		close(told[0]);
		close(told[1]);
		close(0);
		close(1);
		while (waitpid(child, &status, 0) < 0)
			;
		_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
	}
	close(told[1]);
	must(read(told[0], &nothing, 1) == 0, "wait for the pid to be told"); /* before "ready" */
	close(told[0]);
	must(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0, "make / private");
	must(umount2("/proc", MNT_DETACH) == 0, "umount /proc");
}

/* semtimedop needs a semaphore; in an IPC namespace of ours it cannot outlive us. */
static void enter_ipc_namespace(void)
{
	must(unshare(CLONE_NEWIPC) == 0 || unshare(CLONE_NEWUSER | CLONE_NEWIPC) == 0,
	     "unshare(CLONE_NEWIPC)");
}

static void become(unsigned int id)
{
	must(setgroups(0, NULL) == 0, "setgroups");
	must(setresgid(id, id, id) == 0 && setresuid(id, id, id) == 0, "setresuid");
}

/* Fill the file descriptor table but for *spare* entries. */
static void fill_fd_table(int spare)
{
	int fd = dup(0), last = -1;
	rlim_t limit = (rlim_t)(fd + spare + 8);

	must(fd >= 0 && setrlimit(RLIMIT_NOFILE, &(struct rlimit){ limit, limit }) == 0,
	     "RLIMIT_NOFILE");
	while ((fd = open("/dev/null", O_RDONLY)) >= 0)
		last = fd;
	must(errno == EMFILE && last >= spare, "fill the fd table");
	for (; spare; spare--)
		close(last--);
}

/* Kill the process at every call but those that its commands and its work need. */
static void install_filter(enum work work, int every_work)
{
	static const int base[] = {
		SYS_read, SYS_write, SYS_exit, SYS_exit_group, SYS_futex, SYS_nanosleep,
		SYS_clock_nanosleep, SYS_clock_gettime, SYS_poll, SYS_madvise, SYS_rt_sigreturn,
		SYS_restart_syscall,
	};
	static const int by_work[NWORKS] = {
		[W_EPOLL] = SYS_epoll_wait, [W_SIGTIMEDWAIT] = SYS_rt_sigtimedwait,
		[W_SEMTIMEDOP] = SYS_semtimedop, [W_RECV] = SYS_recvfrom,
	};
	struct sock_filter code[64];
	struct sock_fprog program = { 0, code };
	unsigned short n = 0;

	code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
						 offsetof(struct seccomp_data, arch));
	code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
	code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
						 offsetof(struct seccomp_data, nr));
	for (size_t i = 0; i < COUNT(base) + NWORKS; i++) {
		int nr = i < COUNT(base) ? base[i] : by_work[i - COUNT(base)];
		if (i >= COUNT(base) && (!nr || (!every_work && i - COUNT(base) != work)))
			continue;
		code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K,
							 (unsigned int)nr, 0, 1);
		code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	}
	code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	program.len = n;
	must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS");
	must(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) == 0,
	     "seccomp");
}

#endif
