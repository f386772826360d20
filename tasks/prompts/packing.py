"""Token ids as bytes: unsigned 32-bit integers, little-endian."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable


def pack(ids: Iterable[int]) -> bytes:
    """Return four bytes an id."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(data: bytes) -> list[int]:
    """Return the ids that `pack` was given."""
    packed = array("I")
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()
