"""Which profiles are used again before the KV cache lets them go, and that this is what keeps them."""

from __future__ import annotations

import pytest

from tasks.job import Sampling
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.kv_events import CPU, GPU, AllBlocksCleared, BlockStored
from worker_gpu.engines.simulated_batch import ContinuousBatch
from worker_gpu.engines.simulated_options import SimulationOptions
from worker_gpu.freshness import FEW, KEPT_S, Freshness, one_token_of

BLOCK, TOKENS, CAPACITY, FREE = 16, 160, 1_600, 640
A, B = "a" * 64, "b" * 64


def stored(freshness: Freshness, tokens: int, medium: str = GPU) -> None:
    """Have the engine store so many tokens."""
    freshness.hear(0, BlockStored((b"x",), None, tokens, BLOCK, medium))


def used(*profiles: str, at: float = 0.0, tokens: int = TOKENS) -> Freshness:
    """Return what knows of these uses, the latest last."""
    freshness = Freshness()
    for profile in profiles:
        freshness.use(profile, range(tokens), "salt", at)
    return freshness


def due(freshness: Freshness, *, now: float = 1.0, free: int = FREE, places: int = 32, held: int = TOKENS) -> list[str]:
    """Return what is due."""
    return list(freshness.due(CAPACITY, free, places, now, lambda _profile: held))


def test_a_profile_is_due_once_a_quarter_of_the_free_cache_was_stored_since_its_use() -> None:
    """And then again only after as much more; its use by a request counts, too."""
    freshness = used(A, B)
    stored(freshness, FREE // 4)
    assert due(freshness) == []
    stored(freshness, 1)
    freshness.use(B, range(TOKENS), "salt", 0.5)
    assert due(freshness) == [A]
    assert due(freshness) == []
    stored(freshness, FREE // 4 + 1)
    assert due(freshness) == [B, A]


def test_nothing_is_due_where_only_other_tiers_or_nobody_stores() -> None:
    """What is cleared or goes to RAM takes no room on the GPU."""
    freshness = used(A)
    stored(freshness, 10 * CAPACITY, CPU)
    freshness.hear(1, AllBlocksCleared())
    assert due(freshness) == []


def test_what_is_not_wholly_there_is_left_to_be_computed_when_it_is_asked_for() -> None:
    """Its turn comes when it is there again."""
    freshness = used(A)
    stored(freshness, FREE)
    assert due(freshness, held=TOKENS - BLOCK) == []
    assert due(freshness) == [A]


def test_the_latest_are_kept_as_far_as_there_is_room_and_what_nobody_asks_for_is_not() -> None:
    """1,600 tokens hold ten profiles of 160."""
    names = [f"{number:064}" for number in range(11)]
    freshness = used(*names)
    stored(freshness, FREE)
    assert due(freshness) == list(reversed(names[1:]))
    stored(freshness, FREE)
    assert due(freshness, now=KEPT_S + 1) == []
    freshness.use(A, range(TOKENS), "salt", KEPT_S + 1)
    stored(freshness, FREE)
    assert due(freshness, now=KEPT_S + 1) == [A]


def test_no_more_are_asked_for_at_once_than_there_is_room_for() -> None:
    """Those come first whose turn to go does, the rest follows; and a few are asked for where there is no room."""
    freshness = used(A, *(f"{number:064}" for number in range(20)), tokens=16)
    stored(freshness, FREE)
    freshness.use(A, range(16), "salt", 0.5)
    stored(freshness, FREE)
    first = due(freshness, places=13, held=16)
    assert len(first) == 13
    assert A not in first
    rest = due(freshness, places=0, held=16)
    assert len(rest) == FEW
    assert rest[-1] == A
    assert due(freshness, held=16) == []


@pytest.mark.parametrize("keeps", [True, False])
def test_a_profile_that_is_kept_fresh_outlives_what_passes_through_the_cache(keeps: bool) -> None:
    """40 blocks, of which the profile needs ten; 30 requests with six blocks of their own pass through."""
    batch = ContinuousBatch(SimulationOptions(num_blocks=40, answer_tokens=32))
    freshness, cached = Freshness(), []
    batch.events.subscribe(freshness.hear)
    profile = list(range(100, 100 + TOKENS))

    def run(request: GenerationRequest) -> int:
        [sequence] = batch.add(request)
        now = 0.0
        while (now := max(now, batch.due_at())) != float("inf"):
            now += batch.step(now).seconds
        return sequence.cached_tokens

    run(GenerationRequest("first", [*profile, 1], Sampling(max_tokens=40, seed=1), "salt"))
    freshness.use(A, profile, "salt", 0.0)
    for number in range(30):
        run(
            GenerationRequest(
                f"other {number}", list(range(10_000 * number, 10_000 * number + 64)), Sampling(seed=1), "salt"
            )
        )
        if keeps:
            for name, use in freshness.due(40 * BLOCK, 30 * BLOCK, 1, 1.0, lambda _profile: TOKENS).items():
                cached.append(run(one_token_of(name, use)))
    assert run(GenerationRequest("last", [*profile, 1], Sampling(max_tokens=40, seed=1), "salt")) == (
        TOKENS if keeps else 0
    )
    # What keeps it found it wholly each time: it costs the engine one token.
    assert set(cached) == ({TOKENS} if keeps else set())
    assert len(cached) < 30


def test_the_request_that_keeps_a_profile_says_one_token() -> None:
    """And has the profile's own salt, or it would find nothing."""
    freshness = used(A)
    stored(freshness, FREE)
    [(name, use)] = freshness.due(CAPACITY, FREE, 1, 1.0, lambda _profile: TOKENS).items()
    request = one_token_of(name, use)
    assert (request.cache_salt, request.sampling.max_tokens, len(request.prompt_token_ids)) == ("salt", 1, TOKENS + 1)
