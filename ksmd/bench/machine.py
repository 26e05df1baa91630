"""What the figures were taken on: they mean little without it."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import psutil

import ksmd


def describe() -> dict[str, Any]:
    """Tell date, kernel, CPU, memory and huge page settings."""
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "ksmd": ksmd.__version__,
        "kernel": platform.release(),
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "thp": thp.read_text().strip() if thp.exists() else "none",
        "load": os.getloadavg()[0],
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def line(machine: dict[str, Any]) -> str:
    """Give one line for below the tables."""
    return (
        f"{machine['date']}, Linux {machine['kernel']}, {machine['cpu']} ({machine['cpus']} CPUs,"
        f" load {machine['load']:.1f}), {machine['memory_bytes'] >> 30} GiB"
    )
