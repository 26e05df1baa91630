"""The way home: what rt_sigreturn takes of the state that ptrace gives."""

from __future__ import annotations

import struct

from ksmd.remap.frame import for_sigreturn

TILE_DATA = 1 << 18
AVX = 0x7
SIZE, TILES = 2816, 8192


def area(features: int, in_use: int, size: int) -> bytes:
    """An XSAVE area: the CPU's features among the software bytes, XSTATE_BV in the header."""
    made = bytearray(bytes(range(256)) * (size // 256))
    struct.pack_into("=Q", made, 464, features)
    struct.pack_into("=Q", made, 512, in_use)
    return bytes(made)


def test_state_without_dynamic_features_stays_as_it_is() -> None:
    plain = area(AVX, AVX, SIZE)
    assert for_sigreturn(plain) == plain


def test_room_for_tiles_that_a_thread_never_used_is_cut_off() -> None:
    kept = for_sigreturn(area(AVX | TILE_DATA, AVX, SIZE + TILES))
    assert kept == area(AVX, AVX, SIZE)


def test_tiles_in_use_are_kept() -> None:
    full = area(AVX | TILE_DATA, AVX | TILE_DATA, SIZE + TILES)
    assert for_sigreturn(full) == full
