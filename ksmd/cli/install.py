"""``ksmd install``: put units, settings, manual, completions and the C header in their places.

Without --apply it only says what it would do. Doing it twice changes nothing more. Units are
replaced, for local changes belong into drop-ins; settings that are there already are never touched.

The program itself is where pip put it, and the units start it from there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import stat
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ksmd.cli import manual, shipped
from ksmd.cli.common import complain
from ksmd.model.errors import Exit, KsmdError, PrivilegeError, UsageError

HELP = "place units, default settings, manual pages, completions and the C header"

UNITS = (
    "ksmd.service",
    "ksmd.socket",
    "ksmd-pager.service",
    "ksmd-exporter.service",
    "ksmd-exporter.socket",
)
PROGRAM_IN_UNITS = "/usr/bin/ksmd"
CONFIG = Path("etc/ksmd/ksmd.yaml")
_ELSEWHERE = "install ksmd elsewhere, as into a virtual environment in /opt, and run that one"
DROP_INS = Path("etc/ksmd/conf.d")
#: For programs that register memory of their own.
HEADER = "ksmd.h"
EXAMPLES = ("share.c", "share.py")


@dataclass(frozen=True, slots=True)
class Item:
    """One file: where it belongs (from the root on) and what is in it.

    ``kept``: the operator's, once it is there.
    """

    path: Path
    content: bytes
    kept: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of install."""
    add_places(parser)
    parser.add_argument(
        "--program",
        type=Path,
        metavar="PATH",
        help="the ksmd that the units start (default: this one)",
    )
    parser.add_argument(
        "--no-man", action="store_true", help="leave the manual pages out (they need go-md2man)"
    )


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add the options that install and uninstall share."""
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("/"),
        metavar="DIR",
        help="the root of the system, or of a tree to be packed (default /)",
    )
    parser.add_argument(
        "--prefix",
        type=Path,
        default=Path("/usr/local"),
        metavar="DIR",
        help="where units and manual pages go below the root (default /usr/local)",
    )
    parser.add_argument("--apply", action="store_true", help="do it, instead of saying it")


def run(args: argparse.Namespace) -> int:
    """Say what would be placed, or place it."""
    prefix = checked_prefix(args.prefix)
    program = args.program or this_program()
    if not program.is_absolute():
        raise UsageError(f"--program {program} is not an absolute path")
    made = [*items(prefix, program)]
    if not args.no_man:
        made += pages(prefix)
    counts = dict.fromkeys(("new", "replace", "same", "keep"), 0)
    for item in made:
        state = state_of(args.root, item)
        counts[state] += 1
        if state != "same":
            print(f"{state:<8} {args.root / item.path}")
        if args.apply and state in ("new", "replace"):
            place(args.root, item)
    if args.apply:
        make_directory(args.root / DROP_INS)
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    print(f"{len(made)} files: {told}.")
    if not args.apply:
        print("Nothing was changed. `ksmd install --apply` does it.")
    elif args.root == Path("/"):
        print("Next: systemd-sysusers && systemctl daemon-reload && systemctl enable --now ksmd")
    if args.root == Path("/") and (why := unreachable(program)):
        complain("ksmd", f"the service cannot start {program}: {why}", _ELSEWHERE)
    return int(Exit.OK)


def checked_prefix(prefix: Path) -> Path:
    """Give the prefix as seen from the root."""
    if not prefix.is_absolute() or ".." in prefix.parts:
        raise UsageError(f"--prefix {prefix} is not an absolute path")
    return prefix.relative_to("/")


def this_program() -> Path:
    """Give the path of the ksmd command that belongs to this Python."""
    own = Path(sys.argv[0])
    if own.name == "ksmd" and own.is_file():
        return own.absolute()
    return Path(sysconfig.get_path("scripts")) / "ksmd"


def unreachable(program: Path) -> str:
    """Say why the service, with a user of its own and no sight of homes, cannot run *program*."""
    with contextlib.suppress(OSError):
        first = program.read_bytes().partition(b"\n")[0]
        interpreter = (
            os.fsdecode(first.removeprefix(b"#!").split()[0]) if first[:2] == b"#!" else ""
        )
        for path in filter(None, (str(program), interpreter)):
            real = Path(path).resolve()
            if real.parts[1] in ("root", "home"):
                return f"{real} lies in a home directory, which the unit hides (ProtectHome=)"
            for one in (real, *real.parents):
                if not one.stat().st_mode & stat.S_IXOTH:
                    return f"{one} is closed to other users"
    return ""


def items(prefix: Path, program: Path) -> Iterator[Item]:
    """Make all files but the manual pages; *prefix* is seen from the root."""
    # pydantic and shtab, which no other verb of ksmd needs before it runs
    from ksmd.cli import completions  # noqa: PLC0415
    from ksmd.settings import json_schema, render_default_config  # noqa: PLC0415

    for name in UNITS:
        text = shipped.unit(name).replace(f"={PROGRAM_IN_UNITS} ", f"={program} ")
        yield Item(prefix / "lib/systemd/system" / name, text.encode())
    yield Item(prefix / "lib/sysusers.d/ksmd.conf", shipped.unit("ksmd.sysusers").encode())
    drop_in = shipped.unit("seccomp-targets.conf")
    yield Item(prefix / "share/doc/ksmd/seccomp-targets.conf", drop_in.encode())
    schema = json.dumps(json_schema(), indent=2) + "\n"
    yield Item(prefix / "share/ksmd/ksmd.schema.json", schema.encode())
    for command in ("ksmd", "ksmctl"):
        bash, zsh = (completions.script(command, shell) for shell in completions.SHELLS)
        yield Item(prefix / f"share/bash-completion/completions/{command}", bash.encode())
        yield Item(prefix / f"share/zsh/site-functions/_{command}", zsh.encode())
    yield Item(prefix / "include" / HEADER, shipped.resource(HEADER).encode())
    for name in EXAMPLES:
        example = shipped.resource(f"examples/{name}")
        yield Item(prefix / "share/doc/ksmd/examples" / name, example.encode())
    yield Item(CONFIG, render_default_config().encode(), kept=True)


def pages(prefix: Path) -> list[Item]:
    """Make the manual pages."""
    made = []
    for page in manual.PAGES:
        made.append(Item(place_of_page(prefix, page), manual.roff(page)))
    return made


def place_of_page(prefix: Path, page: str) -> Path:
    """Give the place of a manual page such as ksmd.8."""
    return prefix / f"share/man/man{page.rpartition('.')[2]}" / page


def state_of(root: Path, item: Item) -> str:
    """Compare with what is there: new, replace, same, or keep (the operator's own)."""
    target = root / item.path
    try:
        there = target.read_bytes()
    except FileNotFoundError:
        return "new"
    except OSError as error:
        raise failed(target, error) from error
    if there == item.content:
        return "same"
    return "keep" if item.kept else "replace"


def place(root: Path, item: Item) -> None:
    """Write one file, whole or not at all."""
    target = root / item.path
    make_directory(target.parent)
    new = target.with_name(f".{target.name}.new")
    try:
        new.write_bytes(item.content)
        new.chmod(0o644)
        new.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise failed(target, error) from error


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, for everyone to read."""
    before = os.umask(0o022)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise failed(path, error) from error
    finally:
        os.umask(before)


def failed(path: Path, error: OSError) -> KsmdError:
    """Translate what went wrong with a file."""
    if isinstance(error, PermissionError):
        return PrivilegeError(f"{path}: {error.strerror}", "run this command as root")
    return KsmdError(f"{path}: {error.strerror}")
