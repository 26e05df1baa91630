"""What proves to a later daemon that an extent still holds what was put into it.

An extent is sealed and mapped read-only, so only a fault of ours or of the machine could change it;
but what it holds is memory of many processes, and the daemon that made it may have died of such a
fault. The digest is an HMAC over the keyed checksums (64 bits each) of all pages and over what is
said of the extent. Two steps, because an HMAC over the pages themselves would take longer than the
merge (2 s per GiB against 0.1 s), and because nobody can choose pages against a secret seed.
"""

from __future__ import annotations

import hmac
import json
from typing import Any

from ksmd.core.checksum import sums64_of


class ContentDigest:
    """The digest of one extent under *key*; feed its pages by ``update`` in any pieces."""

    def __init__(self, key: bytes, about: dict[str, Any]) -> None:
        self._seed = int.from_bytes(hmac.digest(key, b"page checksums", "sha256")[:8], "little")
        self._hmac = hmac.new(key, json.dumps(about, sort_keys=True).encode(), "sha256")

    def update(self, pages: memoryview) -> None:
        """Take in the next pages, whole ones."""
        self._hmac.update(sums64_of(pages, self._seed).tobytes())

    def value(self) -> str:
        """Give the digest as text."""
        return self._hmac.hexdigest()

    def matches(self, digest: str) -> bool:
        """Tell whether the digest is *digest*."""
        return hmac.compare_digest(self.value(), digest)
