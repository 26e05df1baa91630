"""What an operator may say: one frozen model per mapping of the settings file.

Every default and every help text of ksmd lives here and nowhere else: the shipped configuration,
the manual page and ``check-config`` are made from these descriptions. Models are strict (no text
becomes a number by itself) and closed (an unknown key is an error), because a mistyped match key
that is silently dropped would select more processes than its author meant.

What a file can say wrongly across keys (two targets of one name, regions that overlap) is judged
by :mod:`ksmd.settings.conflicts`, which works on plain data and so also on files that are wrong
elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from ksmd.model.units import PAGE_SIZE
from ksmd.settings import values
from ksmd.settings.conflicts import conflicts
from ksmd.settings.kinds import (
    ADDRESS_LIMIT,
    Address,
    Count,
    FileMode,
    Glob,
    Kind,
    Name,
    Pids,
    Regex,
    Secs,
    SocketPath,
    TableSize,
    list_to_tuple,
)


class _Model(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True
    )


class Scan(_Model):
    """How fast memory is read; the seed's KSM_START_STOP_KTHREAD."""

    pages_to_scan: Count = Field(
        default=25000, description="Pages to scan before each sleep, as KSM counts them."
    )
    sleep_millisecs: Annotated[int, Field(ge=0, le=3_600_000)] = Field(
        default=20, description="Milliseconds to sleep after each batch of pages_to_scan."
    )
    max_pages_to_merge: Count = Field(
        default=25000, description="The most pages to merge between two sleeps."
    )
    cpu_percent: Annotated[int, Field(ge=0, le=10_000)] = Field(
        default=0,
        description="Percent of one core that all of ksmd's processes together may take over any "
        "ten seconds for what they do by themselves. What is asked for (ksmctl scan, SIGUSR1, "
        "programs' calls) is not held back by it. 0: no limit.",
    )
    advisor: Literal["none", "scan-time"] = Field(
        default="none",
        description="As KSM's advisor_mode. scan-time: pages_to_scan is not taken from here but "
        "chosen anew for each scan, so that it takes target_scan_time; a new target's memory is "
        "scanned faster at first.",
    )
    target_scan_time: Annotated[int, Field(ge=1, le=86400)] = Field(
        default=200, description="Seconds that a full scan shall take, with the advisor."
    )
    advisor_max_cpu: Annotated[int, Field(ge=1, le=100)] = Field(
        default=70,
        description="Percent of one core that scanning may take with the advisor, even if it then "
        "takes longer.",
    )
    advisor_min_pages_to_scan: Count = Field(
        default=500, description="The fewest pages before each sleep that the advisor chooses."
    )
    advisor_max_pages_to_scan: Count = Field(
        default=30000, description="The most pages before each sleep that the advisor chooses."
    )


class Tables(_Model):
    """Sizes of the tables; the seed's module parameters of the same names."""

    page_hash_size: TableSize = Field(
        default=0,
        description="Pages that the page hash table can hold (checksum to candidate). 0 sizes it "
        "from memory: a tenth of the free pages.",
    )
    rmap_hash_size: TableSize = Field(
        default=0,
        description="Pages that the rmap table can hold (page to its last checksum). 0 sizes it "
        "from memory: a tenth of the free pages.",
    )
    sha1_hash_size: TableSize = Field(
        default=0,
        description="Store pages whose HMAC-SHA1 digest is cached. 0 sizes it from memory: "
        "one for every 32 free pages.",
    )


class Window(_Model):
    """How long and how often a target is stopped."""

    deadline_ms: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=10,
        description="Milliseconds within which all threads of a target must stand still; "
        "where one does not, the target is let go and tried again later, with twice the time "
        "(up to sixteen times).",
    )
    stop_ms: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=5,
        description="Milliseconds that a stop window is to take, all in all. It is given so much "
        "work that by those before it 99 of 100 keep to that; one run at least.",
    )
    max_pages: Annotated[int, Field(ge=1, le=1 << 20)] = Field(
        default=4096,
        description="The most pages that one stop window merges.",
    )
    max_runs: Annotated[int, Field(ge=1, le=500)] = Field(
        default=300,
        description="The most runs (neighbouring pages taken as one) that one stop window merges. "
        "Runs of zero pages, which are dropped, do not count.",
    )
    interval_secs: Annotated[int, Field(ge=0, le=86400)] = Field(
        default=10,
        description="Seconds between two stop windows of one target, unless a scan was asked for "
        "(ksmctl scan, SIGUSR1). 0 means no pause.",
    )


class Store(_Model):
    """What shared pages are made of."""

    large_folios: bool = Field(
        default=True,
        description="Make the store of folios of 1 MiB where "
        "/sys/kernel/mm/transparent_hugepage/hugepages-1024kB/shmem_enabled does not give them by "
        "itself: for the milliseconds that it takes to make a part of it, that file then says "
        "advise. Without them memory is needed that is free in whole blocks of 2 MiB; in a "
        "virtual machine that gives such blocks back to its host, this takes twenty times as long.",
    )


class Limits(_Model):
    """What merging may cost a target, and what one user may register."""

    vma_percent: Annotated[int, Field(ge=1, le=50)] = Field(
        default=50,
        description="Percent of vm.max_map_count that a target's mappings may reach by merging. "
        "The rest is left to the program: at the kernel's limit its own mmap and mprotect fail.",
    )
    regions_per_user: Annotated[int, Field(ge=0, le=1 << 20)] = Field(
        default=1024,
        description="The most memory regions that the processes of one user other than root may "
        "have registered over the control socket at one time. 0 lets them register none.",
    )


class Match(_Model):
    """Which processes a target means. Every key that is given must hold."""

    exe: Glob | None = Field(
        default=None,
        description="Path of the executable, as /proc/PID/exe shows it. As in every glob here, "
        "the whole string must match, * also matches /, and case counts.",
        examples=["/usr/bin/python3*"],
    )
    comm: Glob | None = Field(
        default=None,
        description="Name of the process, as /proc/PID/comm shows it: at most 15 bytes.",
        examples=["python3*"],
    )
    cmdline: Regex | None = Field(
        default=None,
        description="Searched for in the command line, its arguments joined by spaces "
        "(Python's re syntax; ^ and $ tie it to the ends).",
        examples=["-m worker( |$)"],
    )
    user: Glob | None = Field(
        default=None,
        description="Name of the user that the process runs as, or the user's number in quotes.",
        examples=["www"],
    )
    cgroup: Glob | None = Field(
        default=None,
        description="Path of the cgroup, as /proc/PID/cgroup shows it.",
        examples=["/system.slice/*"],
    )
    unit: Glob | None = Field(
        default=None,
        description="Name of the systemd unit (*.service, *.scope) that the process belongs to.",
        examples=["infer@*.service"],
    )
    pid: Pids | None = Field(
        default=None,
        description="Process id, or a list of them.",
        examples=[[1001, 1002]],
    )

    @model_validator(mode="after")
    def _selects(self) -> Self:
        if all(getattr(self, key) is None for key in type(self).model_fields):
            keys = ", ".join(type(self).model_fields)
            raise PydanticCustomError(
                "match", "needs at least one of {keys}: without one it would match everything",
                {"keys": keys},
            )  # fmt: skip
        return self


class Region(_Model):
    """A registered address range; the seed's KSM_REGISTER_MEMORY_REGION."""

    start: Address = Field(
        description="First address, a multiple of 4096 below 2^47; hexadecimal (0x7f...) is "
        "understood.",
        examples=["0x7f0000000000"],
    )
    npages: Annotated[int, Field(ge=1, le=ADDRESS_LIMIT // PAGE_SIZE)] = Field(
        description="Length in pages of 4096 bytes.", examples=[65536]
    )

    @model_validator(mode="after")
    def _ends_in_user_memory(self) -> Self:
        if self.end > ADDRESS_LIMIT:
            raise PydanticCustomError(
                "region_end", "ends at {end}, beyond 2^47, the end of user memory",
                {"end": hex(self.end)},
            )  # fmt: skip
        return self

    @property
    def end(self) -> int:
        """The first address after the region."""
        return self.start + self.npages * PAGE_SIZE


def _regions_form(value: object) -> str | None:
    if isinstance(value, str):
        return "keyword"
    return "ranges" if isinstance(value, list | tuple) else None


Regions = Annotated[
    Annotated[Literal["anon", "heap"], Tag("keyword")]
    | Annotated[
        tuple[Region, ...], Field(min_length=1), BeforeValidator(list_to_tuple), Tag("ranges")
    ],
    Discriminator(
        _regions_form,
        custom_error_type="regions",
        custom_error_message="must be anon, heap or a list of {start, npages}",
    ),
    Kind("anon | heap | list of {start, npages}"),
]


class Target(_Model):
    """One entry of ``targets``: some processes, and what of them is merged with what."""

    name: Name = Field(
        description="Name of this entry in status, metrics and logs; each name is used once.",
        examples=["inference"],
    )
    match: Match = Field(description="Which processes are meant: every key given here must hold.")
    regions: Regions = Field(
        default="anon",
        description="What of their memory is registered. anon: every private anonymous mapping "
        "that may be merged, the heap included; heap: the heap ([heap], brk(2)) alone; or a list "
        "of address ranges, which must not overlap.",
        examples=["anon"],
    )
    domain: Name | None = Field(
        default=None,
        description="Trust domain. Pages merge only with pages of the same domain; targets that "
        "give the same name share one. Not set: one domain for each user id (which containers "
        "have in common, unless they have user namespaces).",
        examples=["inference"],
    )
    accept_seccomp_risk: bool = Field(
        default=False,
        description="Merge although a seccomp filter of the process might kill it for a system "
        "call that merging makes it do. Otherwise such a process is refused.",
        examples=[False],
    )
    min_age_secs: Secs = Field(
        default=0,
        description="Leave a process alone until it has run for this many seconds.",
        examples=[0],
    )


def _known_version(value: int) -> int:
    if value != 1:
        raise PydanticCustomError("version", "must be 1, the only version of this format")
    return value


class Settings(_Model):
    """A whole settings file."""

    version: Annotated[int, AfterValidator(_known_version), Kind("1")] = Field(
        description="Version of this format.", examples=[1]
    )
    run: Literal["stop", "merge", "unmerge"] = Field(
        default="merge",
        description="What the daemon does, as KSM's run: stop (0) scans nothing and leaves merged "
        "what is merged; merge (1) scans and merges; unmerge (2) scans nothing and gives every "
        "merged page back.",
    )
    on_stop: Literal["unmerge", "keep"] = Field(
        default="unmerge",
        description="What becomes of merged pages when the daemon is stopped: unmerge gives each "
        "back as memory of its own, after a check that memory suffices; keep leaves them merged, "
        "as does a restart of its systemd unit.",
    )
    socket: SocketPath = Field(
        default=Path("/run/ksmd/ksmd.sock"),
        description="Path of the control socket that ksmctl, the exporter and clients use.",
    )
    socket_mode: FileMode = Field(
        default="0600",
        description="Permissions of the control socket, in octal and quoted. 0600: root alone; "
        "0660: socket_group too; 0666: everybody. Whoever is not root may only register memory of "
        "their own process, scan it, and ask about it.",
    )
    socket_group: Name = Field(
        default="root",
        description="Group of the control socket: its name, or its number in quotes. Unless it is "
        "root, its members may also read all counters and targets, as the exporter does.",
    )
    scan: Scan = Field(default=Scan(), description="How fast memory is read.")
    tables: Tables = Field(
        default=Tables(),
        description="How many pages the tables can hold. A full table skips pages and counts "
        "them; it never grows. Where a domain has more pages than that, equal ones take turns.",
    )
    window: Window = Field(
        default=Window(),
        description="Stop windows: the short times for which a target is stopped to be merged.",
    )
    store: Store = Field(default=Store(), description="The memory that shared pages lie in.")
    limits: Limits = Field(
        default=Limits(), description="What merging may cost, and what users may register."
    )
    targets: Annotated[
        tuple[Target, ...], BeforeValidator(list_to_tuple), Kind("list of targets")
    ] = Field(
        default=(),
        description="Which processes are merged; the first entry that matches a process decides. "
        "An empty list selects none.",
    )

    @model_validator(mode="after")
    def _no_conflicts(self) -> Self:
        found = conflicts(self.model_dump()["targets"])
        if found:
            raise ValidationError.from_exception_data(
                "Settings",
                [
                    InitErrorDetails(
                        type=PydanticCustomError("conflict", "{what}", {"what": what}),
                        loc=path,
                        input=None,
                    )
                    for path, what in found
                ],
            )
        return self

    def resolved_tables(self, free_pages: int) -> values.TableSizes:
        """Sizes of the tables on a host with ``free_pages`` free 4 KiB pages."""
        return self.plain().resolved_tables(free_pages)

    def plain(self) -> values.Settings:
        """Give the same as plain values."""
        return values.settings_of(self.model_dump(mode="json"))


def defaults() -> Settings:
    """Make the settings of a file that says nothing but its version: no target is selected."""
    return Settings(version=1)
