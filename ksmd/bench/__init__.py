"""The benchmark: ksmd beside the kernel's own KSM, on the same memory, in one run.

``python -m ksmd.bench`` starts workers of its own, lays their memory out as a workload says, lets
one of the two merge it as fast as it can, measures, ends them, and does the same with the other:
A B A B, so that a slow minute of the machine meets both. What is compared is the ratio of medians.

What counts as CPU time is everything that works for the merge: for ksmd its daemon, tracer (dead
ones included) and pager, and the workers' own time, since their threads carry out the stop windows;
for KSM the kernel thread, and the workers' own time too. What counts as saved is frames: pages of
the workers less distinct frame numbers behind them, net of page tables, VMAs, tables, store and
processes. Contents are checked before and after.

The kernel's settings come back whatever happens, and every process that was started is ended.
"""
