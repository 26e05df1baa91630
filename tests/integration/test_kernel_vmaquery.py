"""Mappings by address, and files' mappings among many others, as maps shows them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_victims import Victim

from ksmd.kernel import procfs
from ksmd.kernel.vmaquery import VmaQuery, _NoQueryError

pytestmark = pytest.mark.root

#: Anonymous memory in a hundred pieces, and a file that is mapped twice: shared and private.
SCRIPT = """
import tempfile
at = map(200 * PAGE)
[libc.mprotect(ctypes.c_void_p(at + 2 * i * PAGE), PAGE, 1) for i in range(100)]
file = tempfile.TemporaryFile()
file.truncate(8 * PAGE)
reply([map(4 * PAGE, flags=1, fd=file.fileno()), map(8 * PAGE, flags=2, fd=file.fileno())])
"""


@pytest.fixture(params=["ioctl", "maps"])
def victim(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Victim]:
    """A victim that is asked about by the ioctl, and as on a kernel that does not have it."""

    def missing(*_: object, **__: object) -> None:
        raise _NoQueryError

    if request.param == "maps":
        monkeypatch.setattr(VmaQuery, "_query", missing)
    with Victim(SCRIPT) as victim:
        yield victim


def test_every_address_is_found_in_its_mapping(victim: Victim) -> None:
    with VmaQuery(victim.pid, victim.pid) as query:
        for vma in procfs.maps(victim.pid):
            if vma.path in ("[vsyscall]", "[vvar]", "[vvar_vclock]"):
                continue
            found = query.covering(vma.start)
            assert found is not None
            assert found[:6] == vma[:6], "all but the path"
        assert query.covering(4096) is None


def test_files_are_given_and_nothing_else(victim: Victim) -> None:
    shared, private = victim.ready
    every = [vma for vma in procfs.maps(victim.pid) if vma.inode]
    with VmaQuery(victim.pid, victim.pid) as query:
        assert list(query.files()) == every
        assert list(query.files(executable=True)) == [v for v in every if "x" in v.perms]
        assert list(query.files(shared=True)) == [v for v in every if v.perms[3] == "s"]
    assert {shared, private} <= {vma.start for vma in every}


def test_the_main_stack_is_found_without_maps(victim: Victim) -> None:
    (stack,) = [vma for vma in procfs.maps(victim.pid) if vma.path == "[stack]"]
    assert stack.start <= procfs.stack_start(victim.pid, victim.pid) < stack.end
