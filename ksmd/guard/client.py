"""The daemon's side of the pager: starts it, tells it what is merged, and survives its death.

Every context is held twice, by the pager and here (children's contexts too: the pager sends them;
see holdings.py).
While at least one of the two lives, no target sees store content where it dropped memory; while the
pager is dead, targets that touch dropped memory wait. So its end must be noticed (:meth:`fileno`
becomes readable, :meth:`pump` says False) and :meth:`restart` called at once.

What the pager must know at its start is only which ranges are not *settled*: those of stop windows
under way. Nothing else depends on what targets did meanwhile, so a new pager is as good as the old.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterable
from typing import Any

from ksmd import __version__
from ksmd.guard import door
from ksmd.guard.held import Held, KeptExtent, duplicate
from ksmd.guard.holdings import Holdings
from ksmd.guard.intervals import Intervals
from ksmd.guard.line import DEADLINE, Line, PagerGoneError, PagerRefusedError
from ksmd.guard.stored import Stored
from ksmd.kernel import channel, libc, priority
from ksmd.model.units import PAGE_SIZE

#: Ranges per message: the pager answers faults between messages only.
CHUNK = 256
#: Bytes of an extent that the pager locks at a time: it answers faults in between.
KEEP_PART = 16 << 20
#: Pagers that are started in a row when each dies at once.
RESTARTS = 20
#: Seconds for the service manager to start another pager that stands by itself.
SUCCESSOR = 5.0

Ranges = Iterable[tuple[int, int]]

#: All ranges that there can be, for what is to be settled: no need to name each.
_EVERYTHING = ((0, (1 << 64) - PAGE_SIZE),)


class Pager:
    """One pager process. Not thread-safe: it belongs to the daemon's main loop.

    ``id`` is the daemon's number of a target; it must not be used again for another target.
    Calls raise PagerGoneError when the pager is gone, PagerRefusedError when it refuses. Those by
    which something ends (settle, drop, release, hold_rings) hold without it, since the next pager
    hears of what is left alone: nobody is to stop half way through giving something up.
    ``failed`` lists what the pager could not do to protect itself, as sentences. ``name`` is what
    a later daemon finds the process by (see door.py); nobody finds one without a name.

    ``standing`` tells that the pager stands by itself, and so outlives us whatever it holds;
    ``recalled`` that :meth:`recall` found something.

    After :meth:`adopt` and :meth:`recall`: ``highest`` is the highest id ever used; ``kept`` are
    the extents and ``rings`` the pin rings of the daemon before us, whose descriptors are the
    caller's from then on; ``key`` is the key of the digests that daemon left with the extents.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.failed: list[str] = []
        self.standing = False
        self.recalled = False
        self._process: subprocess.Popen[bytes] | None = None
        self._holds = Holdings()
        self._line = Line(self._holds.take)
        self._rings: dict[int, int] = {}

    @property
    def pid(self) -> int:
        """The process, 0 before there was one."""
        return self._line.pid

    @property
    def pidfd(self) -> int:
        """A pidfd of the process, ours: readable once it has ended."""
        return self._line.pidfd

    @property
    def shadow(self) -> int:
        """The process that shares its memory (see shadow.py), 0 when there is none."""
        return self._line.shadow

    # life

    def start(self) -> None:
        """Start the process and wait until it serves."""
        self.standing = False
        mine, its = channel.pair()
        with its:
            self._process = subprocess.Popen(
                door.command(its.fileno(), self.name),
                pass_fds=(its.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # it tells whom it may concern
            priority.go_before_others(self._process.pid)
        self._line.attach(mine, self._process.pid)
        hello = self._line.receive(self._line.patience())
        self._line.see(hello["shadow"])
        self.failed = list(hello["failed"])
        self._tell_key()

    def _tell_key(self) -> None:
        # a child that forks before we have told all others must not get the number of one of them
        known = max(self._holds.children, default=0)
        self._ask({"do": "secret", "key": self.key.hex(), "children": known})

    @classmethod
    def adopt(cls, end: socket.socket, pid: int, name: str = "") -> Pager:
        """Take over a running pager, *pid*, by a channel's end from ``door.knock``.

        All its contexts come to us; :meth:`ids` names the targets. PagerRefusedError while another
        daemon owns it. A pager of another version is replaced by one of ours.
        """
        pager = cls(name)
        try:
            pager._line.attach(end, pid)
            answer = pager._ask({"do": "claim"})
            pager._line.see(answer.get("shadow", 0))
            pager._await_all()
            pager._rings = {
                ring: libc.pidfd_getfd(pager._line.pidfd, fd) for ring, fd in answer["rings"]
            }
        except BaseException:
            pager.leave()
            raise
        pager._holds.highest = int(answer["highest"])
        pager.standing = bool(answer["standing"])
        pager._holds.set_key(bytes.fromhex(answer["secret"]) or pager.key)
        pager._tell_key()
        if answer["version"] != __version__:
            pager.restart()
        return pager

    def _await_all(self) -> None:
        patience = self._line.patience()
        while patience.left():
            self.living_children()  # the dead count for nothing
            held = self.stats()
            if (held["contexts"], held["children"], held["extents"]) == (
                len(self._holds.targets),
                len(self._holds.children),
                len(self._holds.extents),
            ):
                return
        raise PagerGoneError("it does not tell all that it holds")

    def recall(self, manager: Stored) -> bool:
        """Take back what *manager* kept and no pager holds; tell whether there was anything.

        From now on it keeps what we hold while the pager does not stand by itself.
        """
        found = self._holds.recall(manager)
        self.recalled = bool(found.targets or found.children or found.extents)
        if self._line.end is not None:
            self._tell_all(found, list(found.children.items()))
            self._holds.store(not self.standing)
        elif self.recalled:
            self._holds.set_key(found.key)
            self.restart()
        else:
            self._holds.store(True)
        return self.recalled

    def restart(self) -> None:
        """Replace a pager that is dead or hangs; targets that waited go on.

        So is one that dies before it has heard everything. PagerGoneError when none lasts.
        """
        awaited = self.standing
        for tries in range(RESTARTS, -1, -1):
            try:
                self._replace(awaited)
                return
            except PagerGoneError:
                if not tries:
                    raise

    def _replace(self, awaited: bool) -> None:
        self.kill()
        # children that it told of before it died are in the queue until now
        self._line.collect_news()
        self._inherit()
        self._line.detach()
        if not self.standing or not self._await_successor():
            self.start()
            if awaited and door.standing(self.name):  # it came after all: see Pager.stand
                self.standing = True
                self._replace(awaited)
                return
        # those that are born from now on, it will have told us of itself
        children = list(self._holds.children.items())
        if self._rings:
            self._tell_rings()
        self._tell_all(self._holds, children)
        self._holds.store(not self.standing)

    def _tell_all(self, told: Holdings, children: list[tuple[int, tuple[int, int]]]) -> None:
        for extent in told.extents.values():
            self._keep(extent)
        for target, held in told.targets.items():
            self._tell(target, held)
        for key, (target, fd) in children:
            # a child of an unfinished stop window would be owed pages; fork has copied them
            self._ask({"do": "guard", "id": target, "child": key}, fd)

    def _inherit(self) -> None:
        """Take over the children of whom the dead pager could not tell us any more."""
        known = [fd for held in self._holds.targets.values() for fd in held.fds]
        known += [fd for _, fd in self._holds.children.values()]
        for fd in self._line.inherit(known):
            self._holds.add_child(fd)

    def _await_successor(self) -> bool:
        """Wait for the next pager that its service manager starts, and take it over."""
        deadline = time.monotonic() + SUCCESSOR
        while (found := door.open_standing(self.name, SUCCESSOR)) is not None:
            pid, end = found
            with contextlib.suppress(PagerGoneError, PagerRefusedError):
                self._line.attach(end, pid)
                self._take_over()
                self.standing = True
                return True
            self._line.detach()
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return False

    def _take_over(self) -> None:
        """Learn what the service manager alone still held (children), and have all let go there."""
        targets, extents = set(self._holds.targets), set(self._holds.extents)
        self._line.see(self._ask({"do": "claim"})["shadow"])
        patience = self._line.patience()
        while self.stats()["untold"]:
            if not patience.left():  # what it has not told us, "clear" would end
                raise PagerGoneError("it does not tell all that it holds")
        self._ask({"do": "clear"})
        for target in set(self._holds.targets) - targets:  # dropped while there was no pager
            self._holds.drop_target(target)
        for inode in set(self._holds.extents) - extents:
            if (extent := self._holds.drop_extent(inode)) is not None:
                os.close(extent.fd)
        self._tell_key()

    def kill(self) -> None:
        """End the process by force. What it guards waits until :meth:`restart`, or is let go."""
        self._line.kill()
        if self._process is not None:
            self._process.kill()  # does nothing to one that has been waited for
            self._process.wait()
            self._process = None

    def close(self, force: bool = False) -> bool:
        """Let go of everything; tell whether the pager left, or stands by with nothing.

        A pager that holds contexts stays and serves them, unless *force* kills it: only for targets
        of which nothing is merged any more.
        """
        left = False
        with contextlib.suppress(PagerGoneError, PagerRefusedError):
            self._ask({"do": "quit"})
            left = True
        if left and self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(DEADLINE)
        if force:
            self.kill()
            for fd in self._line.inherit(()):
                os.close(fd)
            left = True
        if left:
            self._holds.store(False)
        self._let_go()
        return left

    def leave(self) -> None:
        """Leave an adopted pager to itself, and to the next daemon, with all that it holds."""
        self._holds.close_extents()
        for fd in self._rings.values():
            os.close(fd)
        self._let_go()

    def _let_go(self) -> None:
        self._line.detach()
        self._holds.let_go()

    def alive(self) -> bool:
        """Tell whether the process runs."""
        if self._process is not None and self._process.poll() is not None:
            return False
        return self._line.alive()

    def fileno(self) -> int:
        """Give the channel's descriptor: readable means news, to be taken by :meth:`pump`."""
        return self._line.end.fileno() if self._line.end is not None else -1

    def pump(self) -> bool:
        """Take news without waiting; False when the pager is gone."""
        self._holds.flush()
        return self._line.collect_news() and self.alive()

    # contexts

    @property
    def ids(self) -> list[int]:
        """The targets whose own context is held."""
        return list(self._holds.targets)

    @property
    def highest(self) -> int:
        """The highest id ever used."""
        return self._holds.highest

    @property
    def key(self) -> bytes:
        """The key of the extents' digests."""
        return self._holds.key

    @property
    def kept(self) -> list[KeptExtent]:
        """The extents that are held."""
        return list(self._holds.extents.values())

    @property
    def rings(self) -> dict[int, int]:
        """The pin rings that are held: our descriptors, by their names."""
        return dict(self._rings)

    def guard(
        self,
        target: int,
        fd: int,
        ranges: Ranges = (),
        *,
        track: int = -1,
        about: dict[str, Any] | None = None,
    ) -> None:
        """Hand the target's guard context over, and its tracking context to be held beside it.

        The descriptors stay the caller's; we keep duplicates. *about* (what JSON can hold) is kept
        for a later daemon.
        """
        if target in self._holds.targets:
            raise ValueError(f"{target} is guarded already")
        held = Held(duplicate(fd), Intervals(ranges), about=about or {})
        held.track = duplicate(track) if track >= 0 else -1
        self._holds.add_target(target, held)
        try:
            self._tell(target, held)
        except PagerRefusedError:
            self._holds.drop_target(target)
            raise

    def about(self, target: int) -> dict[str, Any]:
        """Give what was said of a target when it was guarded."""
        return dict(self._holds.targets[target].about)

    def contexts(self, target: int) -> tuple[int, int]:
        """Give duplicates of a target's guard and tracking context (-1: none); the caller's."""
        held = self._holds.targets[target]
        return duplicate(held.fd), duplicate(held.track) if held.track >= 0 else -1

    @property
    def unsettled(self) -> list[int]:
        """Targets with a window that was announced, and neither confirmed nor taken back."""
        held = self._holds.targets.items()
        return [target for target, one in held if one.owed or one.unmerging]

    def extend(self, announced: dict[int, Ranges]) -> None:
        """Announce ranges, by their targets, before the stop windows that merge them."""
        listed = {target: list(ranges) for target, ranges in announced.items()}
        for target, ranges in listed.items():
            self._holds.announce(target, ranges)
        self._send_ranges("extend", listed)

    def begin_unmerge(self, target: int) -> None:
        """Note that a window gives pages back. The pager serves on as before."""
        self._holds.targets[target].unmerging = True

    def settle(self, over: dict[int, Ranges]) -> None:
        """Confirm ranges, by their targets, after the stop windows: populated, CONTINUE called.

        From then on fork copies them, and no ledger is needed to serve a child. Until then a child
        is filled from the store, which cannot see drops without an event (MADV_GUARD_INSTALL), nor
        drops that another pager saw.
        """
        listed = {target: list(ranges) for target, ranges in over.items()}
        for target, ranges in listed.items():
            self._holds.settle(target, ranges)
        with contextlib.suppress(PagerGoneError):
            self._send_ranges("settle", listed)

    def settle_all(self, *targets: int) -> None:
        """Settle whatever is announced: nothing is under way in the targets any more.

        What of it was not merged after all needs no record either.
        """
        owed = []
        for target in targets:
            if (held := self._holds.targets.get(target)) is not None:
                held.unmerging = False
                owed += [target] if held.owed else []
        self.settle(dict.fromkeys(owed, _EVERYTHING))

    def keep(self, extent: KeptExtent) -> None:
        """Have the pager hold an extent in place, so that our death does not move it."""
        self._holds.add_extent(extent)
        self._keep(extent)

    def _keep(self, extent: KeptExtent) -> None:
        end = extent.offset + extent.length
        about = {"about": extent.about}
        for offset in range(extent.offset, end, KEEP_PART):
            header = {"do": "keep", "offset": offset, "length": min(KEEP_PART, end - offset)}
            self._ask(header | about, extent.fd)
            about = {}

    def release(self, inode: int) -> None:
        """Let the pager's hold on an extent go: nobody maps it any more."""
        self._holds.drop_extent(inode)
        self._tell_if_there({"do": "release", "inode": inode})

    def hold_rings(self, rings: dict[int, int]) -> None:
        """Have the pager hold these io_uring descriptors of ours (by name), and with them our pins.

        It lets go of all others. A name must not be used again for another ring.
        """
        if rings != self._rings:
            self._rings = dict(rings)
            with contextlib.suppress(PagerGoneError):
                self._tell_rings()

    def _tell_rings(self) -> None:
        self._ask({"do": "rings", "pid": os.getpid(), "rings": list(self._rings.items())})

    def drop(self, target: int) -> None:
        """Let go of a target that is gone or has nothing merged. Unknown ids are no error."""
        self._holds.drop_target(target)
        self._tell_if_there({"do": "drop", "id": target})

    def living_children(self) -> int:
        """Count the children of all targets that live and may map the store."""
        return int(self._ask({"do": "sweep"})["children"])

    def stats(self) -> dict[str, int]:
        """Give the pager's counters."""
        answer = self._ask({"do": "stats"})
        return {name: value for name, value in answer.items() if name != "ok"}

    def children(self, target: int) -> int:
        """Count the living contexts of processes forked from the target, at any depth."""
        return int(self._ask({"do": "children", "id": target})["children"])

    # inside

    def _tell_if_there(self, header: dict[str, Any]) -> None:
        with contextlib.suppress(PagerGoneError):
            self._ask(header)

    def _tell(self, target: int, held: Held) -> None:
        ranges = list(held.owed)
        first, rest = ranges[:CHUNK], ranges[CHUNK:]
        header = {"do": "guard", "id": target, "ranges": first, "about": held.about}
        self._ask(header, *held.fds)
        self._send_ranges("extend", {target: rest})

    def _send_ranges(self, verb: str, listed: dict[int, list[tuple[int, int]]]) -> None:
        self._line.ask_all(
            [
                {"do": verb, "id": target, "ranges": ranges[index : index + CHUNK]}
                for target, ranges in listed.items()
                for index in range(0, len(ranges), CHUNK)
            ]
        )

    def _ask(self, header: dict[str, Any], *fds: int) -> dict[str, Any]:
        return self._line.ask(header, *fds)
