"""Pure decisions: no os, ctypes, socket, threading or time; clocks and readers are passed in."""
