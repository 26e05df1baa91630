"""The second that a look at memory counts as, so that it tells whether its process ran since.

Looks are kept in whole seconds, four bytes for 64 pages. A process that is found to have run may
have done so in this very second, before a look or after; only what is looked at from the next
second on is known to be as it was left. A scan is over in less. So, where it is known that a
process has run, the next second begins for it there and then: looks that follow count as the later
second, those before keep the earlier one. Such a process may be ahead of the clock a little; one
that runs before each scan, all the time, is not to get further ahead with each of them.
"""

from __future__ import annotations

#: The most seconds that a look may be ahead of the clock.
AHEAD = 2


def since_it_ran(before: int, now: int) -> int:
    """Give the first second of which looks count, for a process that has run by *now*.

    *before* is what this gave last, 0 at first. It is later than what :func:`second_of` ever gave.
    """
    return min(max(now, before), now + AHEAD) + 1


def second_of(since: int, now: int) -> int:
    """Give the second that a look counts as, *now*, where *since* is the first that counts."""
    return since if now < since <= now + AHEAD else now
