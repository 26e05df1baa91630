"""The vocabulary every room shares: values without behaviour.

Import the submodules by name. Nothing here imports numpy except :mod:`ksmd.model.tables` and
:mod:`ksmd.model.plan`, so that the small processes (tracer, pager) can use the rest cheaply.
"""
