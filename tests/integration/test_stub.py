"""The stub's bytes are what its source compiles to, and both sides agree on every field."""

from __future__ import annotations

import re
import struct
import subprocess
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from ksmd.model.tables import STUB_RECORD
from ksmd.model.window import Advice, Op
from ksmd.remap import build, stub
from ksmd.remap.wire import MAPPING_SHIFT, SKIP, Batch

SOURCE = files("ksmd.remap").joinpath("stub.c").read_text()

#: Registers that the stub must leave alone, and instructions that use some without naming them.
VECTOR_REGISTER = re.compile(r"%(?:[xyz]?mm\d+|st\b|k[0-7]\b)")
VECTOR_MNEMONIC = re.compile(r"^(?:f[a-z]+|v[a-z]+|emms|ldmxcsr|stmxcsr|xsave\w*|xrstor\w*)$")
NOT_X87 = {"verr", "verw"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with stub.o, stub.elf and stub.bin, made from the source."""
    directory = tmp_path_factory.mktemp("stub")
    build.compile_stub(directory)
    return directory


def _tool(*arguments: str | Path) -> str:
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def _instructions(built: Path) -> list[str]:
    text = _tool("objdump", "-d", "--no-show-raw-insn", built / "stub.elf")
    return [line.split("\t", 1)[1].strip() for line in text.splitlines() if ":\t" in line]


def test_source_compiles_to_exactly_the_bytes_that_are_checked_in(built: Path) -> None:
    assert (built / "stub.bin").read_bytes() == stub.code()


def test_flat_image_has_no_data_and_nothing_left_to_relocate(built: Path) -> None:
    assert "R_X86_64" not in _tool("objdump", "-r", built / "stub.elf")
    sections = _tool("objdump", "-h", built / "stub.elf")
    named = re.findall(r"^\s*\d+ (\.\w+)\S*\s+([0-9a-f]+)", sections, re.MULTILINE)
    with_bytes = {name for name, size in named if int(size, 16)}
    assert with_bytes <= {".text", ".comment"}, "the flat image would lack what these hold"


def test_stub_touches_general_registers_only(built: Path) -> None:
    instructions = _instructions(built)
    assert len(instructions) > 500, "the disassembly was not understood"
    bad = [
        line
        for line in instructions
        if VECTOR_REGISTER.search(line)
        or (VECTOR_MNEMONIC.match(line.split()[0]) and line.split()[0] not in NOT_X87)
    ]
    assert not bad


def test_detector_of_vector_code_knows_vector_code(tmp_path: Path) -> None:
    # the same check over code that does use them: it must not be blind
    code = "double f(double a) { return a * 3; } long double g(long double a) { return a * 3; }\n"
    (tmp_path / "f.c").write_text(code)
    subprocess.run(["gcc", "-O2", "-c", "f.c", "-o", "stub.elf"], cwd=tmp_path, check=True)
    lines = _instructions(tmp_path)
    assert any(VECTOR_REGISTER.search(line) for line in lines)
    assert any(VECTOR_MNEMONIC.match(line.split()[0]) for line in lines)


def test_stub_makes_the_system_calls_that_seccomp_is_checked_for() -> None:
    listed = re.findall(r"\bSYS_\w+ = (\d+)", SOURCE)
    sigreturn = 15  # made by the target's own restorer, at the end of the stub's tail
    assert sorted({*map(int, listed), sigreturn}) == sorted(stub.SYSTEM_CALLS)


def _offsets(built: Path) -> dict[str, dict[str, int]]:
    """Offsets of every field as the compiler has them, and each struct's size as "sizeof"."""
    plain = re.sub(r"/\*.*?\*/", "", SOURCE, flags=re.DOTALL)
    bodies = dict(re.findall(r"struct (header|record) \{(.*?)\n\};", plain, re.DOTALL))
    structs = {name: re.findall(r"(\w+)(?:\[\d+\])?\s*[,;]", body) for name, body in bodies.items()}
    head = SOURCE[SOURCE.index("typedef unsigned long u64") : SOURCE.index("_Static_assert")]
    lines = [
        f'printf("{name} {field} %zu\\n", __builtin_offsetof(struct {name}, {field}));'
        for name, fields in structs.items()
        for field in fields
    ] + [f'printf("{name} sizeof %zu\\n", sizeof(struct {name}));' for name in structs]
    main = "#include <stdio.h>\n{}\nint main(void) {{ {} return 0; }}\n"
    head = re.sub(r"enum \{ (?:SYS_mmap|EAGAIN).*?\};", "", head, flags=re.DOTALL)
    (built / "offsets.c").write_text(main.format(head, "\n".join(lines)))
    subprocess.run(["gcc", "-w", "offsets.c", "-o", "offsets"], cwd=built, check=True)
    found: dict[str, dict[str, int]] = {"header": {}, "record": {}}
    for line in _tool(built / "offsets").splitlines():
        name, field, offset = line.split()
        found[name][field] = int(offset)
    return found


def test_python_reads_and_writes_the_header_where_the_compiler_put_its_fields(built: Path) -> None:
    offsets = _offsets(built)["header"]
    assert offsets.pop("sizeof") == stub.HEADER_SIZE
    buffers = {name: offsets.pop(name) for name in ("msghdr", "iov", "control", "byte")}
    assert {name: stub.field_offset(name) for name in offsets} == offsets
    data = stub.pack_header(0x1000, **{name: number for number, name in enumerate(offsets, 7)})
    assert len(data) == stub.HEADER_SIZE
    assert {name: stub.field_of(data, name) for name in offsets} == {
        name: n for n, name in enumerate(offsets, 7)
    }
    # the message points at the three buffers behind it: struct msghdr, struct iovec
    message = struct.unpack_from("=8Q", data, buffers["msghdr"])
    iov, control = 0x1000 + buffers["iov"], 0x1000 + buffers["control"]
    assert message == (0, 0, iov, 1, control, buffers["byte"] - buffers["control"], 0, 0)
    assert struct.unpack_from("=QQ", data, buffers["iov"]) == (0x1000 + buffers["byte"], 1)


def test_header_fields_keep_their_sign() -> None:
    data = stub.pack_header(0, store=(1 << 64) - 1, aside=1 << 47, fail_errno=12)
    fields = {name: stub.field_of(data, name) for name in ("store", "aside", "fail_errno")}
    assert (fields["store"], fields["aside"], fields["fail_errno"]) == (-1, 1 << 47, 12)


def test_python_packs_records_as_the_compiler_reads_them(built: Path) -> None:
    offsets = _offsets(built)["record"]
    assert offsets.pop("sizeof") == stub.RECORD_SIZE == STUB_RECORD.itemsize
    fields = STUB_RECORD.fields
    assert fields is not None
    assert {name: fields[name][1] for name in STUB_RECORD.names or ()} == offsets
    record = np.zeros(1, STUB_RECORD)
    record["start"], record["length"], record["offset"], record["aside"] = 0x11, 0x22, 0x33, 0x44
    record["op"], record["flags"], record["result"] = Op.REMERGE, Advice.DONTFORK, -61
    batch = Batch(record.tobytes())
    batch.protect(0, 1, prot=5, number=3)
    batch.skip(0)
    assert (batch.op, batch.ends[0], batch.offsets[0], batch.quarantine) == (3, 0x33, 0x33, 0x66)
    record["prot"], record["flags"] = 5, Advice.DONTFORK | 3 << MAPPING_SHIFT | SKIP
    assert batch.tobytes() == record.tobytes()


def test_stages_and_operations_have_the_numbers_of_the_source() -> None:
    numbers = dict(
        re.findall(r"\b(OP_\w+|REC_\w+|RES_\w+|UNDONE|STUCK|MODE_SETUP) = (\d+)", SOURCE)
    )
    assert {op: int(numbers[f"OP_{op.name}"]) for op in Op} == {op: op.value for op in Op}
    advice = {one: int(numbers[f"REC_{one.name}"]) for one in Advice if one}
    assert advice == {one: one.value for one in advice}
    assert int(numbers["REC_HARMLESS"]) == Advice.HUGEPAGE | Advice.NOHUGEPAGE
    assert int(numbers["RES_FLAGGED"]) == stub.FLAGGED
    assert (int(numbers["REC_SKIP"]), int(numbers["REC_MAPPING_SHIFT"])) == (SKIP, MAPPING_SHIFT)
    assert int(numbers["MODE_SETUP"]) == stub.MODE_SETUP
    assert (int(numbers["UNDONE"]), int(numbers["STUCK"])) == (stub.UNDONE, stub.STUCK)
    stages = re.search(r"enum \{ (ST_NONE[^}]*) \}", SOURCE)
    assert stages
    assert stages[1].split(", ").index("ST_DONE") == stub.STAGE_DONE
