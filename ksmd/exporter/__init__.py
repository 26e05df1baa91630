"""The Prometheus endpoint: a process of its own, without privileges, that only reads a socket."""
