"""What the index says is cached, against what the simulated engine then finds: random prompts, seeded, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tasks.prompts.radix import Tier
from tests.worker_gpu.engines.engine_runs import collect, request, with_engine
from worker_gpu.cache import CacheIndex
from worker_gpu.engines.kv_events import KvEvent, Subscriber
from worker_gpu.engines.simulated import SimulatedEngine

BLOCK = 16
#: Room for about a third of all profiles.
BLOCKS = 120
#: The numbers of the events that are lost.
LOST = range(200, 260)


class Profile(NamedTuple):
    """A static part under an organization's salt."""

    name: str
    chain: tuple[tuple[str, int], ...]
    token_ids: list[int]
    salt: str


def profiles(rng: random.Random) -> list[Profile]:
    """Return profiles of two organizations, with the same words, of which half share a base."""
    made = []
    base = [rng.randrange(1000) for _ in range(150)]
    for number in range(8):
        own = [rng.randrange(1000) for _ in range(rng.randrange(20, 400))]
        for salt in ("one", "two"):
            ids, chain = (base + own, ((f"base {salt}", 150),)) if number % 2 else (own, ())
            made.append(Profile(f"{number} {salt}", chain, ids, salt))
    return made


async def mispredicted(engine: SimulatedEngine, cache: CacheIndex, rng: random.Random, known: list[Profile]) -> int:
    """Ask for 100 prompts, some beside others; return how often another number of tokens was found than expected."""
    wrong = 0
    for _ in range(100):
        profile = rng.choice(known)
        prompt = profile.token_ids + [rng.randrange(1000) for _ in range(rng.choice((0, 1, 40)))]
        cache.register(profile.name, profile.chain, len(profile.token_ids), profile.token_ids, profile.salt)
        # The last token of a prompt is always computed; of whole blocks, that is the last block.
        most = (len(prompt) - 1) // BLOCK * BLOCK
        own = cache.blocks.leading(engine.block_hashes(prompt, profile.salt))[0] * BLOCK
        expected = min(own, most)
        assert cache.cached(profile.name)[0] // BLOCK * BLOCK == min(own, len(profile.token_ids) // BLOCK * BLOCK)
        asked = request(prompt, salt=profile.salt, max_tokens=rng.randrange(1, 60))
        beside = rng.choices(known, k=rng.randrange(3))
        others = [request(other.token_ids, salt=other.salt, max_tokens=9) for other in beside]
        deltas, *_ = await asyncio.gather(collect(engine, asked), *(collect(engine, other) for other in others))
        wrong += deltas[0].cached_tokens != expected
    return wrong


@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_expected_is_found(seed: int) -> None:
    """By every prompt, in a cache that evicts all the time; the figures add up."""

    async def check(engine: SimulatedEngine) -> None:
        cache, rng = CacheIndex(engine, 3600), random.Random(seed)
        assert await mispredicted(engine, cache, rng, profiles(rng)) == 0
        facts = cache.facts
        assert facts.capacity_tokens == BLOCK * BLOCKS
        assert 0 < facts.known_tokens <= cache.blocks.count(Tier.GPU) * BLOCK <= facts.capacity_tokens
        assert cache.blocks.losses == 0
        mirror = {name: held for name, held in cache.changes().items() if any(held)}
        assert mirror == cache.everything()
        assert mirror

    with_engine(check, num_blocks=BLOCKS, max_num_seqs=4)


def losing(subscribe: Callable[[Subscriber], None], *, notices: bool) -> Callable[[Subscriber], None]:
    """Return a subscription that loses some events; their numbers are missing, or are not."""

    def subscribe_losing(subscriber: Subscriber) -> None:
        def take(number: int, event: KvEvent) -> None:
            if number not in LOST:
                subscriber(number if notices or number < LOST.start else number - len(LOST), event)

        subscribe(take)

    return subscribe_losing


@pytest.mark.parametrize("notices", [True, False])
def test_lost_events_are_noticed(notices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine tells again, and all is right from there on. If nobody noticed, it would not be."""

    async def check(engine: SimulatedEngine) -> None:
        monkeypatch.setattr(engine, "subscribe", losing(engine.subscribe, notices=notices))
        cache, rng = CacheIndex(engine, 3600), random.Random(3)
        known = profiles(rng)
        meanwhile = await mispredicted(engine, cache, rng, known)
        afterwards = await mispredicted(engine, cache, rng, known)
        print(f"{meanwhile} prompts were mispredicted while events were lost, {afterwards} afterwards")
        assert cache.blocks.losses == notices
        assert meanwhile
        assert bool(afterwards) is not notices

    with_engine(check, num_blocks=BLOCKS, max_num_seqs=4)
