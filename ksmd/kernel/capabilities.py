"""Which capabilities this process has. Being root is neither enough (containers) nor needed."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ksmd.kernel import libc, procfs

#: Those without which nothing is merged (include/uapi/linux/capability.h); what else ksmd can use
#: (CAP_SYS_ADMIN, CAP_SYS_NICE) it can also do without, and says what that costs.
NEEDED = {"CAP_DAC_OVERRIDE": 1, "CAP_IPC_LOCK": 14, "CAP_SYS_PTRACE": 19}
LAST_CAP = 40  # CAP_CHECKPOINT_RESTORE
PR_CAP_AMBIENT, PR_CAP_AMBIENT_LOWER = 47, 3


def missing() -> list[str]:
    """Name the needed capabilities that are not effective."""
    effective = int(procfs.status_fields(os.getpid())["CapEff"], 16)
    return [name for name, bit in NEEDED.items() if not effective >> bit & 1]


def pass_on(names: Iterable[str]) -> None:
    """Let the program that we become keep only these of the capabilities that a service gave us.

    They are the ambient set (capabilities(7)); root's own are not affected. OSError.
    """
    kept = {NEEDED[name] for name in names}
    for bit in range(LAST_CAP + 1):
        if bit not in kept:
            libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_LOWER, bit)
