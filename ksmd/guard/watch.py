"""All contexts that the pager holds: reading their messages, answering, following forks.

Messages of one context are read in batches, and events are handled before the batch's faults: an
event that was read lets its sender go on, so a drop must be in the ledger before anything is
filled. Nothing here waits. What cannot be answered now (the kernel says EAGAIN until the sender of
an event has run on) is kept and tried again by the loop's next turn.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from ksmd.guard.context import Answer, Context, Counters, State
from ksmd.guard.settle import complain
from ksmd.kernel import userfaultfd

#: Requests per turn spent on filling one child.
FILL_SLICE = 64
#: A sweep for dead children is made after as many forks as there are children, but not below this.
SWEEP_FORKS = 64
#: Seconds between two tries to read a FORK for which no descriptor was left.
STARVING = 0.02

Ranges = Iterable[tuple[int, int]]


class Holder(Protocol):
    """Who else holds contexts: see stored.py."""

    def hold(self, context: Context) -> None:
        """Hold a context too."""

    def let_go(self, context: Context) -> None:
        """Let it go; its descriptors are about to be closed here."""


class Watch:
    """The contexts, by descriptor. ``unannounced`` and ``gone`` are news for the owner's copy.

    *tell* is called for each new child before anything else is done with it: from the moment its
    FORK was read until it has been sent on, this process alone holds it. *holder* is told of every
    context.
    """

    def __init__(self, epoll: select.epoll, tell: Callable[[], None], holder: Holder) -> None:
        self.count = Counters()
        self.starved = 0
        self.highest = 0  # of all ids, also those that were dropped
        self.unannounced: dict[int, Context] = {}
        self.gone: list[int] = []
        self._epoll = epoll
        self._tell = tell
        self._holder = holder
        self._by_fd: dict[int, Context] = {}
        self._roots: dict[int, Context] = {}
        self._filling: list[Context] = []
        self._retry: list[Context] = []
        self._starving: list[Context] = []
        self._next_key = 1
        self._forks_since_sweep = 0
        self._fluent = False
        self._short = False
        self._starving_until = 0.0

    # what the channel's verbs need

    def __contains__(self, fd: int) -> bool:
        return fd in self._by_fd

    def __iter__(self) -> Iterator[Context]:
        return iter(list(self._by_fd.values()))

    @property
    def contexts(self) -> int:
        """How many targets' own contexts are held."""
        return len(self._roots)

    @property
    def live(self) -> int:
        """How many contexts are held, children included."""
        return len(self._by_fd)

    @property
    def busy(self) -> bool:
        """Something is unfinished that no file descriptor will announce."""
        return bool(self._filling or self._retry)

    @property
    def starving(self) -> bool:
        """A fork waits for a descriptor."""
        return bool(self._starving)

    @property
    def eager(self) -> bool:
        """There is filling to do that nothing hinders."""
        return bool(self._filling) and self._fluent

    def has_root(self, target: int) -> bool:
        """Tell whether the target's own context is held."""
        return target in self._roots

    def root(self, target: int) -> Context:
        """Give the target's own context; KeyError."""
        return self._roots[target]

    def add(
        self,
        fd: int,
        target: int,
        key: int,
        ranges: Ranges,
        track: int = -1,
        about: dict[str, Any] | None = None,
    ) -> None:
        """Take over a context: of a target (key 0) or of a child. Ours to close from then on.

        *track* is the target's tracking context, which is only held; *about* is kept for a later
        owner. OSError, and nothing done, when *fd* is no context or had no UFFDIO_API handshake.
        """
        userfaultfd.wake_all(fd)
        context = Context(fd, target, key, self.count)
        context.track, context.about = track, about or {}
        self.highest = max(self.highest, target)
        for start, end in ranges:
            context.extend(start, end)
        self.reserve(key)
        if not key:
            self._roots[target] = context
        self._watch(context)

    def reserve(self, key: int) -> None:
        """Give no child a key up to *key*."""
        self._next_key = max(self._next_key, key + 1)

    def drop(self, target: int) -> None:
        """Let the target's own context go. Its children stay."""
        context = self._roots.pop(target, None)
        if context is not None:
            self._close(context)

    def clear(self) -> None:
        """Let everything go: another holds it all."""
        self._roots.clear()
        for context in list(self._by_fd.values()):
            self._close(context)
        self.gone.clear()

    @property
    def roots(self) -> Iterable[Context]:
        """The targets' own contexts."""
        return self._roots.values()

    def children(self, target: int) -> int:
        """Count the living contexts that descend from the target."""
        self.sweep()
        return sum(1 for c in self._by_fd.values() if c.key and c.target == target)

    def announce_all(self) -> None:
        """A new owner wants to hold everything: all contexts are news."""
        self.gone.clear()
        self.unannounced = {c.fd: c for c in self._by_fd.values()}

    # the loop's turn

    def serve(self, fd: int) -> None:
        """Read what waits on *fd* and answer it."""
        context = self._by_fd.get(fd)
        if context is not None:
            self._serve(context)

    def go_on(self) -> None:
        """Do one bounded part of what is unfinished."""
        retry, self._retry = self._retry, []
        for context in retry:
            self._serve(context)
            for page in list(context.waiting):
                self._fault(context, page)
        if self._starving and time.monotonic() >= self._starving_until:
            self._feed()
        if self._filling:
            self._fill(self._filling.pop(0))

    def sweep(self, roots: bool = False) -> None:
        """Let contexts go whose process is gone: children, and *roots* if nobody else does it."""
        self._forks_since_sweep = 0
        for context in list(self._by_fd.values()):
            if (roots or context.key) and userfaultfd.is_dead(context.fd):
                self._bury(context)

    # inside

    def _holds(self, context: Context) -> bool:
        # not by number alone: a closed descriptor's number comes back with the next fork
        return self._by_fd.get(context.fd) is context

    def _watch(self, context: Context) -> None:
        os.set_blocking(context.fd, False)
        self._by_fd[context.fd] = context
        self._epoll.register(context.fd, select.EPOLLIN)
        self._holder.hold(context)

    def _close(self, context: Context) -> None:
        self._holder.let_go(context)
        self._epoll.unregister(context.fd)
        del self._by_fd[context.fd]
        for pending in (self._filling, self._retry, self._starving):
            if context in pending:
                pending.remove(context)
        context.waiting.clear()
        if self.unannounced.pop(context.fd, None) is None and context.key:
            self.gone.append(context.key)
        os.close(context.fd)
        if context.track >= 0:
            os.close(context.track)

    def _bury(self, context: Context) -> None:
        if not self._holds(context):
            return
        if not context.key:
            self._roots.pop(context.target, None)
        self._close(context)
        self.count.reaped += 1

    def _serve(self, context: Context) -> None:
        if not self._holds(context):
            return
        try:
            messages = userfaultfd.read_messages(context.fd)
            self._short = False
        except OSError as error:
            self._short = True
            self._starve(context, error)
            return
        faults = [m for m in messages if m.event == userfaultfd.EVENT_PAGEFAULT]
        if len(faults) < len(messages):
            for message in messages:
                self._event(context, message)
        for message in faults:
            self.count.faults += 1
            self._fault(context, message.start)

    def _event(self, context: Context, message: userfaultfd.Message) -> None:
        if message.event == userfaultfd.EVENT_REMOVE:
            context.on_remove(message.start, message.end)
        elif message.event == userfaultfd.EVENT_REMAP:
            context.on_remap(message.start, message.end, message.to)
        elif message.event == userfaultfd.EVENT_FORK:
            self._forked(context, message.fd)

    def _forked(self, context: Context, fd: int) -> None:
        child = context.fork(fd, self._next_key)
        self._next_key += 1
        self.unannounced[fd] = child
        self._tell()
        self._watch(child)
        if child.state is State.FILL:
            self._fill(child)
        self._forks_since_sweep += 1
        if self._forks_since_sweep >= max(SWEEP_FORKS, len(self._by_fd) - len(self._roots)):
            self.sweep()

    def _fault(self, context: Context, address: int) -> None:
        if not self._holds(context):  # the fault before this one found it dead
            return
        answer = context.fault(userfaultfd, address)
        if answer is Answer.AGAIN:
            if context not in self._retry:
                self._retry.append(context)
        elif answer is Answer.GONE and context.key:
            self._bury(context)

    def _fill(self, context: Context) -> None:
        answer = context.fill(userfaultfd, FILL_SLICE)
        self._fluent = answer is Answer.MORE
        if answer is Answer.GONE:
            self._bury(context)
        elif answer is not Answer.DONE:
            self._filling.append(context)

    def _starve(self, context: Context, error: OSError) -> None:
        """Reading failed: no descriptor is left for a child. Make room, and try again in a while.

        The event stays, so the fork waits; faults are told first and are still answered.
        """
        if not self._starving:
            self.starved += 1
            self._starving_until = time.monotonic()
            complain(f"a target's fork waits: {error.strerror}; {self.live} contexts held")
        if context not in self._starving:
            self._starving.append(context)
            # it stays readable; without this the loop would spin
            self._epoll.modify(context.fd, 0)

    def _feed(self) -> None:
        """Let contexts of the dead go, and read again where a fork waits."""
        self.sweep()
        for context in list(self._starving):
            self._serve(context)
            if self._holds(context) and not self._short:
                self._starving.remove(context)
                self._epoll.modify(context.fd, select.EPOLLIN)
        self._starving_until = time.monotonic() + STARVING
