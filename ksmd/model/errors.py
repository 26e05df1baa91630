"""The errors a user may meet. Each carries what to do about it and the exit code it leads to."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of ``ksmd`` and ``ksmctl``."""

    OK = 0
    FAILED = 1
    USAGE = 2
    PRIVILEGE = 3
    KERNEL = 4


class KsmdError(Exception):
    """Something the user can act on. ``str()`` is one sentence, ``hint`` says what to do."""

    exit_code = Exit.FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(KsmdError):
    """A wrong command line or a wrong configuration."""

    exit_code = Exit.USAGE


class PrivilegeError(KsmdError):
    """The caller lacks a capability or an identity that the operation needs."""

    exit_code = Exit.PRIVILEGE


class KernelFeatureError(KsmdError):
    """The running kernel lacks a feature without which the operation would not be safe."""

    exit_code = Exit.KERNEL


class TargetGoneError(KsmdError):
    """The process has exited, has called execve(2), or its pid belongs to another process now."""
