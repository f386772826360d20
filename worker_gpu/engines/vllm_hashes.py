"""By what name vLLM knows a block of its KV cache: the end of a hash chain over salt and token ids.

`worker_gpu.engines.block_hashes` is the same for the simulated engine. The function is vLLM's own, so that the worker can
tell before a request whether its blocks are cached. It must give the same in this process as in EngineCore: the settings
choose sha256 over CBOR, whose chain begins with a constant, or with PYTHONHASHSEED where that is set, and EngineCore inherits
it. An operator may choose another function in `engine.options`. The chains of xxhash begin with random bytes that only
EngineCore knows: then nothing is known of the cache.

KV events name a block by the last 64 bits of its hash. Salts are secret, so nobody can look for two that are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tasks.logs import get_logger

#: What is asked for unless the operator chooses: it depends on nothing but its input, unlike vLLM's default over pickles.
ALGORITHM = "sha256_cbor"
NAME_BYTES = 8

logger = get_logger(__name__)


def name_of(block_hash: bytes | int) -> bytes:
    """Return a block's name, given its hash as it is or as an event has it."""
    return block_hash.to_bytes(NAME_BYTES, "big") if isinstance(block_hash, int) else block_hash[-NAME_BYTES:]


class BlockHasher:
    """Computes the names of a prompt's full blocks of `block_size` tokens by vLLM's function `algorithm`."""

    def __init__(self, algorithm: str, block_size: int) -> None:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed

        self._block_size = block_size
        hash_of = get_hash_fn_by_name(algorithm)
        seed = resolve_none_hash_seed(hash_of)
        self._hash: Callable[[Any], bytes] | None = None
        if seed != resolve_none_hash_seed(hash_of):
            logger.warning("what the KV cache holds is not known: its hashes are random")
            return
        self._hash, self._start = hash_of, hash_of(seed)

    def names(self, token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
        """Return the names, in order; none if they cannot be known."""
        if self._hash is None:
            return []
        names, parent, size = [], self._start, self._block_size
        extra: tuple[tuple[str, str], ...] | None = (("cache_salt", cache_salt),)
        for end in range(size, len(token_ids) + 1, size):
            parent = self._hash((parent, tuple(token_ids[end - size : end]), extra))
            names.append(parent[-NAME_BYTES:])
            extra = None
        return names
