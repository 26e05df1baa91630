"""Who may call what is root's: root, and the user that ksmd itself runs as."""

from __future__ import annotations

import os

import pytest

from ksmd.daemon import access
from ksmd.daemon.connection import CallError

OWN = 811


@pytest.mark.parametrize(
    ("uid", "allowed"), [(0, True), (OWN, True), (1000, False), (65534, False)]
)
def test_only_root_and_the_user_of_ksmd_control_it(
    monkeypatch: pytest.MonkeyPatch, uid: int, allowed: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: OWN)
    for method in ("Unmerge", "Pause", "Reload", "a method that was forgotten"):
        if allowed:
            access.check(method, uid)
        else:
            with pytest.raises(CallError):
                access.check(method, uid)


def test_what_is_not_root_s_is_open_to_every_user() -> None:
    for method, who in access.METHODS.items():
        if who is not access.Access.ROOT:
            access.check(method, 65534)
