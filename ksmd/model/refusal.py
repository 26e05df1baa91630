"""Every reason for which a page, a range or a process is left alone: one name, one sentence.

KSM drops such pages silently. ksmd counts each under a name that ``status`` and ``why`` print, with
a sentence that says what it means and, where something can be done, what.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Names of refusals, as they appear in ``status --json``."""

    # the process
    GONE = "gone"
    KERNEL_THREAD = "kernel-thread"
    ZOMBIE = "zombie"
    OURSELVES = "ourselves"
    ARCHITECTURE = "architecture"
    TRACED = "traced"
    FROZEN = "frozen"
    UNSTOPPABLE = "unstoppable"
    SHARED_MM = "shared-mm"
    SECCOMP = "seccomp"
    SHADOW_STACK = "shadow-stack"
    NO_GADGET = "no-gadget"
    NO_ANCHOR = "no-anchor"
    NO_THREAD = "no-thread"
    FD_TABLE = "fd-table"
    PINNED_PROCESS = "pinned-process"
    STALE_STUB = "stale-stub"
    PRIVILEGE = "privilege"
    POISONED = "poisoned"
    NO_GUARD = "no-guard"
    UNGUARDED = "unguarded"
    RELEASED = "released"
    # the VMA
    FILE_BACKED = "file-backed"
    SHARED_MAPPING = "shared-mapping"
    STACK = "stack"
    SPECIAL_MAPPING = "special-mapping"
    NOT_WRITABLE = "not-writable"
    LOCKED = "locked"
    DONTFORK = "dontfork"
    WIPEONFORK = "wipeonfork"
    DONTDUMP = "dontdump"
    SEALED = "sealed"
    SECRET = "secret"
    DROPPABLE = "droppable"
    HUGETLB = "hugetlb"
    PFN_IO = "pfn-io"
    USERFAULTFD = "userfaultfd"
    KERNEL_KSM = "kernel-ksm"
    OTHER_FLAGS = "other-flags"
    NOT_MAPPED = "not-mapped"
    # the page
    FORK_SHARED = "fork-shared"
    SWAPPED = "swapped"
    PINNED_PAGE = "pinned-page"
    RSEQ = "rseq"
    VOLATILE = "volatile"
    CHANGED = "changed"
    DIGEST = "digest"
    TABLE_FULL = "table-full"
    VMA_BUDGET = "vma-budget"
    NO_PROFIT = "no-profit"
    STORE_FULL = "store-full"
    MEMORY = "memory"
    WINDOW_FAILED = "window-failed"


SENTENCES: dict[Reason, str] = {
    Reason.GONE: "the process has exited, has called execve, or its pid was given to another",
    Reason.KERNEL_THREAD: "kernel threads have no memory of their own",
    Reason.ZOMBIE: "the process is dead and waits for its parent",
    Reason.OURSELVES: "ksmd does not merge its own processes",
    Reason.ARCHITECTURE: "only 64-bit x86-64 processes are supported",
    Reason.TRACED: "another tracer (a debugger, strace) holds the process; ksmd tries again later",
    Reason.FROZEN: "the process is frozen by its cgroup; ksmd tries again when it is thawed",
    Reason.UNSTOPPABLE: "a thread did not stop within the deadline (vfork, a wait in the kernel)",
    Reason.SHARED_MM: "another process shares the memory (CLONE_VM); ksmd cannot stop all writers",
    Reason.SECCOMP: "its seccomp filter would kill the calls that a merge needs"
    " (accept_seccomp_risk: true merges it all the same)",
    Reason.SHADOW_STACK: "the process uses a shadow stack",
    Reason.NO_GADGET: "no syscall instruction to borrow was found in its executable memory",
    Reason.NO_ANCHOR: "no free page was found at the far end of its main stack",
    Reason.NO_THREAD: "no thread was at a place where a system call may be borrowed",
    Reason.FD_TABLE: "its file descriptor table is full (raise its RLIMIT_NOFILE)",
    Reason.PINNED_PROCESS: "devices or the kernel may write to its memory behind the page table"
    " (pinned or registered buffers)",
    Reason.STALE_STUB: "the stub of an earlier window has not left the process yet",
    Reason.PRIVILEGE: "ksmd lacks a capability for this process (CAP_SYS_PTRACE, CAP_SYS_ADMIN)",
    Reason.POISONED: "an undo failed in this process; it runs on, and ksmd leaves it alone",
    Reason.NO_GUARD: "without a working guard nothing is merged (see `ksmctl features`)",
    Reason.UNGUARDED: "it maps the store and nobody guards it (a pager and its daemon died): memory"
    " that it drops may read as before; ksmd gives its pages back as soon as it can",
    Reason.RELEASED: "somebody asked for its pages back; `ksmctl resume` lets it merge again",
    Reason.FILE_BACKED: "the mapping belongs to a file",
    Reason.SHARED_MAPPING: "the mapping is shared already (MAP_SHARED)",
    Reason.STACK: "main stacks are not merged",
    Reason.SPECIAL_MAPPING: "a mapping of the kernel ([vdso], [vvar], ...)",
    Reason.NOT_WRITABLE: "the mapping is not both readable and writable",
    Reason.LOCKED: "the memory is locked (mlock)",
    Reason.DONTFORK: "the program asked that children do not get this memory (MADV_DONTFORK)",
    Reason.WIPEONFORK: "the program asked that children get zeros (MADV_WIPEONFORK)",
    Reason.DONTDUMP: "the program keeps this memory out of core dumps (MADV_DONTDUMP)",
    Reason.SEALED: "the mapping is sealed (mseal)",
    Reason.SECRET: "secret memory (memfd_secret)",
    Reason.DROPPABLE: "droppable memory (MAP_DROPPABLE)",
    Reason.HUGETLB: "hugetlbfs pages are not merged",
    Reason.PFN_IO: "a mapping of a device or of raw frames",
    Reason.USERFAULTFD: "the program handles page faults here itself, and is not stopped",
    Reason.KERNEL_KSM: "the kernel's own KSM works on this range (MADV_MERGEABLE)",
    Reason.OTHER_FLAGS: "the mapping has a flag that ksmd does not know, so it is left alone",
    Reason.NOT_MAPPED: "nothing is mapped there",
    Reason.FORK_SHARED: "the page is shared already, by fork or by kernel KSM",
    Reason.SWAPPED: "the page is swapped out",
    Reason.PINNED_PAGE: "the page is pinned, or shared by fork, at this moment (EBUSY)",
    Reason.RSEQ: "the page holds a thread's restartable-sequence area, which the kernel writes",
    Reason.VOLATILE: "the page changed since the last full scan",
    Reason.CHANGED: "the page changed between the plan and the byte compare",
    Reason.DIGEST: "the checksum matched and the digest did not",
    Reason.TABLE_FULL: "the tables are full: it waits for its turn (tables: in the settings)",
    Reason.VMA_BUDGET: "mapping it would take more of vm.max_map_count than ksmd allows itself",
    Reason.NO_PROFIT: "merging it would cost more memory than it saves",
    Reason.STORE_FULL: "the store could not grow (memory, locked memory, file descriptors)",
    Reason.MEMORY: "not enough memory is free on the host, or below a limit of its memory cgroup"
    " (memory.max, memory.high), to give its pages back",
    Reason.WINDOW_FAILED: "a step of the stop window failed and was undone",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """One "no": the reason, what it was said of, and a detail where there is one."""

    reason: Reason
    subject: str = ""
    detail: str = ""

    @property
    def sentence(self) -> str:
        """The sentence an operator reads."""
        return SENTENCES[self.reason]
