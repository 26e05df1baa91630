"""Composition: the main loop, the pipeline, the control socket."""
