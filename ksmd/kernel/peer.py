"""Who is at the other end of a Unix socket, in the kernel's words only (unix(7), socket(7)).

A pid alone proves nothing: the process that connected may be gone, and another may have its pid.
SO_PEERPIDFD (Linux 6.5) gives a descriptor of the very process that connected, whenever it is asked
for. While that one has not ended, its pid cannot belong to anybody else, so what /proc/PID says is
said of it if it is read between two looks at the descriptor.

What one process may keep across execve(2) is its pid, its start time and its sockets, but not its
memory. :func:`exec_token` tells one memory from the next.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct

from ksmd.kernel import procfs
from ksmd.model.errors import KernelFeatureError, KsmdError, TargetGoneError
from ksmd.model.process import TargetId

# include/uapi/asm-generic/socket.h; Python 3.11 does not name them
SO_PEERGROUPS = 59
SO_PEERPIDFD = 77

_MAX_GROUPS = 256  # Python's getsockopt takes 1024 bytes at most; who has more is told of none


def open_pidfd(sock: socket.socket) -> int:
    """Open a pidfd of the process that connected *sock*; TargetGoneError where it is too late."""
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENODATA):
            raise TargetGoneError("the process that connected is gone") from error
        if error.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
            raise KernelFeatureError(
                "this kernel cannot say for certain which process connected (SO_PEERPIDFD)",
                "Linux 6.5 can; until then only rules of the settings select processes",
            ) from error
        raise KsmdError(f"cannot identify the caller: {error.strerror}") from error
    pidfd: int = struct.unpack("=i", data)[0]
    return pidfd


def groups(sock: socket.socket) -> frozenset[int]:
    """Give the supplementary groups that the process had when it connected."""
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * _MAX_GROUPS)
    except OSError:
        return frozenset()
    return frozenset(struct.unpack(f"={len(data) // 4}I", data))


def open_process(pid: int) -> int:
    """Open a pidfd of the process that has *pid* now."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        # EINVAL: a thread of a process, not the process itself
        if error.errno == errno.EINVAL:
            raise TargetGoneError(f"process {pid} is gone") from error
        raise procfs.translate(error, f"process {pid}") from error


def ended(pidfd: int) -> bool:
    """Tell whether the process behind *pidfd* has ended, reaped or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def identify(pidfd: int, pid: int) -> TargetId:
    """Name the process behind *pidfd*, whose pid is *pid*; TargetGoneError when it has ended."""
    try:
        found = procfs.target_id(pid)
    except TargetGoneError:
        raise TargetGoneError(f"process {pid} has ended") from None
    if ended(pidfd):  # then *pid* may have been another's when it was read
        raise TargetGoneError(f"process {pid} has ended")
    return found


def caller(pidfd: int, pid: int) -> TargetId:
    """Do as :func:`identify`, and close *pidfd*."""
    try:
        return identify(pidfd, pid)
    finally:
        os.close(pidfd)


def user_ids(pid: int) -> tuple[int, ...]:
    """Give real, effective, saved and file system user id of *pid* (proc_pid_status(5))."""
    return tuple(map(int, procfs.status_fields(pid).get("Uid", "").split()))


def exec_token(pid: int) -> bytes:
    """Give what differs between the program that *pid* runs now and one that it execs later.

    That is its auxiliary vector (getauxval(3)). Addresses in it are random anew at each execve; for
    a program that runs with other privileges AT_SECURE and the ids differ whatever the addresses.
    """
    token = procfs.read_process(pid, "auxv")
    if not token:
        raise TargetGoneError(f"process {pid} has no memory any more")
    return token
