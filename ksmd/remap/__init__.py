"""The only code that changes another process: store, stub, tracee session, tracer, engine."""
