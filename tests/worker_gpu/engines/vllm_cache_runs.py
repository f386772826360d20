"""What the index says is cached, against what vLLM then finds."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from itertools import count
from typing import NamedTuple

from tests.worker_gpu.engines.vllm_host import collect, request
from worker_gpu.cache import CacheIndex
from worker_gpu.engines.kv_events import BlockRemoved, BlockStored, KvEvent
from worker_gpu.engines.vllm import VllmEngine

WAIT_S = 60.0
_numbers = count()


class Profile(NamedTuple):
    """A static part under an organization's salt."""

    name: str
    token_ids: list[int]
    salt: str


class Found(NamedTuple):
    """Of one prompt, the tokens that the index expected in the cache, and those that vLLM found."""

    expected: int
    cached: int


class Seen:
    """What events said, of the kind that makes it hard to follow: evictions, and those of a copy while others stay."""

    def __init__(self) -> None:
        self.evicted = self.copies_left = 0
        self._copies: Counter[bytes] = Counter()

    def hear(self, _number: int, event: KvEvent) -> None:
        """Count one event."""
        if isinstance(event, BlockStored):
            self._copies.update(event.block_hashes)
        elif isinstance(event, BlockRemoved):
            self._copies.subtract(event.block_hashes)
            self.evicted += len(event.block_hashes)
            self.copies_left += sum(self._copies[block] > 0 for block in event.block_hashes)


def profiles(rng: random.Random, most: int) -> list[Profile]:
    """Return profiles of two organizations, with the same words, of up to `most` tokens; half of them share a base."""
    base = _tokens(rng, 130)
    texts = [_tokens(rng, rng.choice((64, rng.randrange(20, most - 130)))) for _ in range(8)]
    texts[::2] = [base + own for own in texts[::2]]
    return [Profile(f"{next(_numbers)}", text, salt) for text in texts for salt in ("one", "two")]


async def ask(engine: VllmEngine, cache: CacheIndex, profile: Profile, more: list[int], answer: int) -> Found:
    """Ask for so many tokens; return once the index knows what came of it."""
    prompt, size = profile.token_ids + more, engine.limits.block_size
    cache.register(profile.name, (), len(profile.token_ids), profile.token_ids, profile.salt)
    whole = cache.blocks.leading(engine.block_hashes(prompt, profile.salt))[0] * size
    job = request(prompt, name=f"cache-{next(_numbers)}", salt=profile.salt, max_tokens=answer)
    deltas = await collect(engine.generate(job))
    await settle(engine, cache)
    # The last token of a prompt is always computed; of whole blocks, that is the last block.
    return Found(min(whole, (len(prompt) - 1) // size * size), deltas[0].cached_tokens)


async def ask_many(
    engine: VllmEngine, cache: CacheIndex, rng: random.Random, known: list[Profile], prompts: int
) -> list[Found]:
    """Ask with these profiles at random; some prompts are whole blocks, and some come in pairs, which makes copies."""
    found = []
    for _ in range(prompts):
        profile = rng.choice(known)
        more = _tokens(rng, rng.choice((0, 1, 50)))
        found.append(await ask(engine, cache, profile, more, rng.choice((1, 1, 40))))
        if rng.random() < 0.2:
            twins = [request(profile.token_ids, name=f"twin-{next(_numbers)}", salt=profile.salt) for _ in range(2)]
            await asyncio.gather(*(collect(engine.generate(twin)) for twin in twins))
            await settle(engine, cache)
    return found


async def settle(engine: VllmEngine, cache: CacheIndex) -> None:
    """Wait until the index has heard of all so far: of the blocks of a prompt that comes after it."""
    name, ids = f"last-{(number := next(_numbers))}", [3 + number % 500, 3 + number // 500, *range(3, 34)]
    cache.register(name, (), len(ids), ids, "last")
    await collect(engine.generate(request(ids, name=name, salt="last", max_tokens=1)))
    async with asyncio.timeout(WAIT_S):
        while not cache.cached(name)[0]:
            await asyncio.sleep(0.002)


def _tokens(rng: random.Random, number: int) -> list[int]:
    return [rng.randrange(10, 500) for _ in range(number)]
