"""The client libraries: every kind of buffer in Python, every call and every error in C and C++."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from harness import PATIENCE, store_mappings
from programs import NOBODY, RESOURCES

pytestmark = pytest.mark.root

_AS_NOBODY = """
import os
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
"""

#: Makes two equal buffers of one kind, shares them with each other, and says what came of it.
_BUFFERS = f"""
import array, hashlib, json, mmap, sys
import numpy as np
from ksmd.client import RemoteError, SharedMemoryArea
{_AS_NOBODY}
path, kind, size = sys.argv[1], sys.argv[2], 1 << 20
data = np.arange(size // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

def anonymous():
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made[:] = data.tobytes()
    return made

MAKE = {{
    "numpy": lambda: data.copy(),
    "numpy, in Fortran's order": lambda: np.asfortranarray(data.reshape(256, -1)),
    "numpy, a part of it": lambda: data.copy()[512:-512],
    "mmap": anonymous,
    "bytearray": lambda: bytearray(data.tobytes()),
    "bytes": lambda: data.tobytes(),
    "array": lambda: array.array("Q", data.tobytes()),
    "memoryview": lambda: memoryview(bytearray(data.tobytes())),
}}
one, other = MAKE[kind](), MAKE[kind]()
before = [hashlib.sha256(bytes(buffer)).digest() for buffer in (one, other)]

def intact():
    return [hashlib.sha256(bytes(buffer)).digest() for buffer in (one, other)] == before

told = {{}}
with SharedMemoryArea(path) as sma:
    told["pages"] = [sma.register(buffer) for buffer in (one, other)]
    told["merged"] = sma.share()["merged"]
    told["intact"] = [intact()]
    if kind == "bytearray":
        try:
            one.extend(b"more")
            told["resized"] = True
        except BufferError:
            told["resized"] = False
    print(json.dumps(told), flush=True)
    sys.stdin.readline()
if kind == "bytearray":
    one.extend(b"more")
    del one[-4:]
print(json.dumps(intact()), flush=True)
sys.stdin.readline()
"""

KINDS = (
    "numpy", "numpy, in Fortran's order", "numpy, a part of it", "mmap", "bytearray", "bytes",
    "array", "memoryview",
)  # fmt: skip


def python(code: str, *arguments: object) -> subprocess.Popen:
    """Run code whose large buffers all lie where malloc maps them, at equal offsets."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )


def told(process: subprocess.Popen):
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"it ended with code {process.wait(PATIENCE)}"
    return json.loads(line)


@pytest.mark.parametrize("kind", KINDS)
def test_the_python_client_shares_buffers_of_every_kind(kind, module_daemon):
    """GIVEN two equal buffers THEN they share pages in the area, and none after it."""
    process = python(_BUFFERS, module_daemon.socket, kind)
    try:
        answer = told(process)
        one, other = answer["pages"]
        assert one == other
        assert one in {253, 254, 255, 256}
        assert (answer["merged"], answer["intact"]) == (one, [True])
        assert answer.get("resized") in {None, False}, "a buffer of an area cannot be resized"
        assert store_mappings(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        assert told(process) is True
    finally:
        process.communicate("\n")
    assert process.returncode == 0


_REFUSED = f"""
import mmap, sys
import numpy as np
from ksmd.client import KsmdError, RemoteError, SharedMemoryArea
{_AS_NOBODY}
from ksmd.model.errors import PrivilegeError
words = np.zeros((512, 512))
shared = mmap.mmap(-1, 1 << 20)
with SharedMemoryArea(sys.argv[1]) as sma:
    for wrong in (words[:, ::2], b"", b"short", bytearray(100), np.zeros(0)):
        try:
            sma.register(wrong)
            raise SystemExit("taken")
        except ValueError:
            pass
    try:
        sma.register(shared)
        raise SystemExit("taken")
    except RemoteError as error:
        assert error.name.endswith(".InvalidRegion"), error.name
        assert error.parameters["reason"] == "shared-mapping", error.parameters
    shared.resize(1 << 21)  # what was not taken is not held
    try:
        sma.share()
        raise SystemExit("shared nothing")
    except RemoteError as error:
        assert error.name.endswith(".NothingRegistered"), error.name
    sma.register(words)
    sma.remove()
    words.resize((10, 10))
try:
    SharedMemoryArea(sys.argv[1], domain="d").register(np.zeros(1 << 16))
    raise SystemExit("named a domain")
except PrivilegeError:
    pass
"""


def test_the_python_client_says_what_cannot_be_shared(module_daemon):
    process = python(_REFUSED, module_daemon.socket)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


# -- C and C++ -------------------------------------------------------------------------------------

_C = """
#include <assert.h>
#include <sys/mman.h>
#include "ksmd.h"

#define PAGES 64u

static char *memory(int flags)
{
	char *at = (char *)mmap(0, PAGES * 4096, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
	unsigned word, value = 1;

	assert(at != MAP_FAILED);
	for (word = 0; word < PAGES * 1024; word++)
		((unsigned *)at)[word] = value = value * 1664525u + 1013904223u;
	return at;
}

int main(int argc, char **argv)
{
	char *one = memory(MAP_PRIVATE), *other = memory(MAP_PRIVATE), *shared = memory(MAP_SHARED);
	struct ksmd ksmd, second;
	struct ksmd_counts counts;
	long area, scan;
	unsigned round, merged = 0;

	assert(argc == 2);
	assert(ksmd_open(&ksmd, "/nowhere/at/all") == -ENOENT);
	assert(strstr(ksmd_error(&ksmd), "/nowhere/at/all"));
	ksmd_close(&ksmd);

	assert(ksmd_open(&ksmd, argv[1]) == 0);
	assert(ksmd_open(&second, argv[1]) == 0);
	area = ksmd_create_area(&ksmd);
	scan = ksmd_create_scan(&ksmd);
	assert(area > 0 && scan > 0);

	/* errors, each with its number and its words */
	assert(ksmd_scan(&ksmd, scan, 10, 10, &counts) == -EAGAIN && counts.scanned == 0);
	assert(ksmd_share(&ksmd, area, NULL) == -EAGAIN);
	assert(strstr(ksmd_error(&ksmd), "nothing is registered"));
	assert(ksmd_register(&ksmd, area, one, 100) == -EINVAL);
	assert(ksmd_register(&ksmd, area, shared, PAGES * 4096) == -EINVAL);
	assert(strstr(ksmd_error(&ksmd), "cannot be registered"));
	assert(ksmd_register(&second, area, one, PAGES * 4096) == -ENOENT);
	assert(ksmd_share(&ksmd, area + 1000, &counts) == -ENOENT);
	assert(ksmd_scan(&second, scan, 10, 10, &counts) == -ENOENT);

	/* the whole pages inside what is named; then a scanner merges them by and by */
	assert(ksmd_register(&ksmd, area, one + 1, PAGES * 4096 - 1) == PAGES - 1);
	assert(strcmp(ksmd_error(&ksmd), "") == 0);
	assert(ksmd_register(&ksmd, area, other + 4096, (PAGES - 1) * 4096) == PAGES - 1);
	assert(ksmd_register(&ksmd, area, other + 4096, 4096) == -EINVAL); /* an overlap */
	for (round = 0; round < 100 && merged < PAGES - 1; round++) {
		assert(ksmd_scan(&ksmd, scan, 50, 10, &counts) == 0);
		/* what is merged already is not read again */
		assert(counts.scanned <= 50 && counts.merged >= 0 && counts.merged <= 10);
		merged += (unsigned)counts.merged;
	}
	assert(merged == PAGES - 1);
	assert(memcmp(one, other, PAGES * 4096) == 0);
	one[5000]++;
	assert(memcmp(one, other, PAGES * 4096) != 0);
	one[5000]--;

	assert(ksmd_remove(&ksmd, area) == 0);
	assert(ksmd_share(&ksmd, area, &counts) == -EAGAIN);
	assert(memcmp(one, other, PAGES * 4096) == 0);
	ksmd_close(&second);
	ksmd_close(&ksmd);
	assert(ksmd_share(&ksmd, area, &counts) == -EBADF);
	assert(ksmd_create_area(&ksmd) == -EBADF);
	ksmd_close(&ksmd);
	return 0;
}
"""

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"]
COMPILERS = {
    "C99": ["gcc", "-std=c99", "-D_GNU_SOURCE"],
    "C23": ["gcc", "-std=c2x", "-D_GNU_SOURCE"],
    "C++11": ["g++", "-std=c++11"],
    "C++20": ["g++", "-std=c++20"],
}


@pytest.mark.parametrize("language", COMPILERS)
def test_the_header_answers_every_call_and_every_error_in(language, module_daemon, tmp_path):
    """GIVEN a program of no privilege THEN each call does what it says, or says why not."""
    source = tmp_path / f"calls.{'cc' if '++' in language else 'c'}"
    source.write_text(_C)
    program = module_daemon.socket.parent / f"calls-{language}"  # where everybody may run it
    command = [*COMPILERS[language], "-O1", "-g", "-fsanitize=address,undefined", *WARNINGS]
    subprocess.run([*command, f"-I{RESOURCES}", str(source), "-o", str(program)], check=True)
    done = subprocess.run(
        [program, module_daemon.socket], user=NOBODY, group=NOBODY, extra_groups=[],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
