"""A guest that checks itself: busybox and a script, as an initial RAM disk for any kernel.

It keeps copies of one file, so that guests share much with each other and each with itself, checks
their sums without end, and says "OK" and a number, or "CORRUPT", on its console.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t tmpfs none /data
for i in 1 2 3 4 5 6 7 8; do cat /bin/busybox > /data/$i; done
cd /data; md5sum * > /sums
n=0
while md5sum -c -s /sums; do
    n=$((n + 1)); echo "OK $n"
    cat /bin/busybox > /data/new && mv /data/new /data/$((n % 8 + 1))
done
echo CORRUPT
"""


def guest_memory(place: Path) -> Path:
    """Make the RAM disk in *place*: its path."""
    root = place / "root"
    for name in ("bin", "data", "dev"):
        (root / name).mkdir(parents=True)
    (root / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (root / "init").write_text(INIT)
    for program in ("bin/busybox", "init"):
        (root / program).chmod(0o755)
    subprocess.run(["mknod", root / "dev/console", "c", "5", "1"], check=True)
    command = "find . | cpio -o -H newc --quiet > ../initrd"
    subprocess.run(command, shell=True, cwd=root, check=True)
    return place / "initrd"
