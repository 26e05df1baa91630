"""Makes ``stub.bin`` of ``stub.c``: ``python -m ksmd.remap.build``.

The bytes are checked in so that no compiler is needed to run ksmd; a test compares them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).parent
COMPILER: Final = "gcc-12"
COMPILE: Final = (
    "-Os -ffreestanding -fPIE -fno-plt -mgeneral-regs-only -fno-stack-protector"
    " -fcf-protection=none -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns"
    " -Wall -Wextra -Werror"
).split()


def compile_stub(into: Path, compiler: str = COMPILER) -> bytes:
    """Compile stub.c in directory *into* and give its flat bytes."""
    steps = (
        [compiler, *COMPILE, "-c", str(_HERE / "stub.c"), "-o", "stub.o"],
        ["ld", "--no-warn-rwx-segments", "-static", "-nostdlib", "--build-id=none", "-N",
         "-e", "_start", "-T", str(_HERE / "stub.ld"), "stub.o", "-o", "stub.elf"],
        ["objcopy", "-O", "binary", "-j", ".text", "stub.elf", "stub.bin"],
    )  # fmt: skip
    for step in steps:
        subprocess.run(step, cwd=into, check=True)
    return (into / "stub.bin").read_bytes()


def _main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        made = compile_stub(Path(directory))
    (_HERE / "stub.bin").write_bytes(made)
    print(f"stub.bin: {len(made)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
