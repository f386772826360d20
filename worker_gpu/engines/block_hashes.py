"""By what name a block of the simulated KV cache is known: a hash chain, as vLLM's, over salt and token ids.

The salt begins the chain, so it is part of every hash: two organizations never share a block. The bytes are not
vLLM's own, which would cost four times as much to compute.

Prompts that share a long beginning are the rule here, and hashing is most of what a request costs the simulation. So
the chain is extended by runs of RUN_BLOCKS blocks, and the runs seen last are remembered: a run is a pure function of
the hash before it and its tokens, and looking one up costs a tenth of computing it.
"""

from __future__ import annotations

import functools
import hashlib
from array import array
from collections.abc import Sequence

TOKEN_BYTES = array("I").itemsize
RUN_BLOCKS = 32
REMEMBERED_RUNS = 4096


def as_bytes(token_ids: Sequence[int]) -> bytes:
    """Return token ids as bytes, TOKEN_BYTES each; what is hashed. Raises OverflowError for an id out of range."""
    return array("I", token_ids).tobytes()


def chain_start(cache_salt: str) -> bytes:
    """Return what comes before the first block's hash."""
    return hashlib.sha256(cache_salt.encode()).digest()


def extend_chain(parent: bytes, tokens: bytes, block_size: int) -> list[bytes]:
    """Return the hash of each full block of `tokens`; the hash before the first is `parent`."""
    hashes: list[bytes] = []
    run = RUN_BLOCKS * block_size * TOKEN_BYTES
    whole = len(tokens) // run * run
    for start in range(0, whole, run):
        hashes += _run(parent, tokens[start : start + run], block_size)
        parent = hashes[-1]
    return hashes + _hash_blocks(parent, tokens[whole:], block_size)


def block_hashes(token_ids: Sequence[int], cache_salt: str, block_size: int) -> list[bytes]:
    """Return the hash of each full block of a prompt."""
    return extend_chain(chain_start(cache_salt), as_bytes(token_ids), block_size)


@functools.lru_cache(maxsize=REMEMBERED_RUNS)
def _run(parent: bytes, tokens: bytes, block_size: int) -> list[bytes]:
    return _hash_blocks(parent, tokens, block_size)


def _hash_blocks(parent: bytes, tokens: bytes, block_size: int) -> list[bytes]:
    sha256, hashes, step = hashlib.sha256, [], block_size * TOKEN_BYTES
    for end in range(step, len(tokens) + 1, step):
        parent = sha256(parent + tokens[end - step : end]).digest()
        hashes.append(parent)
    return hashes
