"""ksmd: a page-merging daemon in user space.

The straight line, and the room (package) in which each step lives::

    settings -> targets -> regions -> candidates (pagemap) -> read -> checksum -> page hash + rmap
             -> plan (runs, digests, ranked by profit, within budgets) -> store filled
             -> stop window: re-check, quarantine, compare bytes, map, guard, cure
             -> ledger -> status, metrics

* ``model``     the vocabulary: frozen dataclasses, enums, numpy dtypes, refusals. No behaviour.
* ``settings``  what an operator may say, with every default and its help.
* ``core``      pure decisions: selection, eligibility, tables, planner, ledger. No os, no clock.
* ``kernel``    the one room that touches the kernel; ``OSError`` is translated there, once.
* ``remap``     the only code that changes another process: tracer, stub, store, engine.
* ``guard``     the pager, which answers faults on merged pages.
* ``daemon``    composition: main loop, pipeline, control socket, signals.
* ``cli``       the verbs of ``ksmd`` and ``ksmctl``.

Imports go one way: model <- core; model, kernel <- remap, guard; all <- daemon <- cli.
A matching checksum or digest only makes a candidate; nothing merges before a byte compare in the
target's stop window. This module stays free of imports: the tracer and the pager start from it.
"""

__version__ = "0.1.0"
