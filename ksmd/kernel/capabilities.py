"""Which capabilities this process has. Being root is neither enough (containers) nor needed."""

from __future__ import annotations

import os

from ksmd.kernel import procfs

#: Those without which nothing is merged (include/uapi/linux/capability.h); what else ksmd can use
#: (CAP_SYS_ADMIN, CAP_SYS_NICE) it can also do without, and says what that costs.
NEEDED = {"CAP_DAC_OVERRIDE": 1, "CAP_IPC_LOCK": 14, "CAP_SYS_PTRACE": 19}


def missing() -> list[str]:
    """Name the needed capabilities that are not effective."""
    effective = int(procfs.status_fields(os.getpid())["CapEff"], 16)
    return [name for name, bit in NEEDED.items() if not effective >> bit & 1]
