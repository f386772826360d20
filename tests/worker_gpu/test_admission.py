"""What a worker asks for: as much as its engine can do, never more, and never nothing for ever."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import pytest

from tasks.job import Sampling
from worker_gpu.admission import NOBODY, Admission, Memory, Share, Taken, is_full, takes_more
from worker_gpu.engines.base import EngineLoad, GenerationRequest
from worker_gpu.engines.simulated_batch import ContinuousBatch
from worker_gpu.engines.simulated_options import SimulationOptions
from worker_gpu.prefill_rate import START_RATE, PrefillRate

IDLE = EngineLoad(kv_usage=0.0)
UNKNOWN = Memory()


def admission(max_requests: int = 8, max_tokens: int = 1000) -> Admission:
    """Return that of a worker with nothing in hand."""
    return Admission("gpu@test", max_requests, max_tokens)


def test_what_is_in_flight_counts_until_its_first_token() -> None:
    """By what should have to be computed of it; a request that ends without one counts no more either."""
    mine = admission()
    assert mine.wish(IDLE, UNKNOWN).budget == 1000
    long, cached = mine.deliver(900), mine.deliver(700, 640)
    wish = mine.wish(IDLE, UNKNOWN)
    assert (wish.in_flight, wish.budget, wish.load, wish.room) == (960, 40, 1600, 6)
    mine.begin(long, 0, 0.1, at=1.0)
    wish = mine.wish(IDLE, UNKNOWN)
    assert (wish.in_flight, wish.budget, wish.load, wish.room) == (60, 940, 1600, 6)
    mine.end(cached)
    mine.end(long)
    mine.end(long)
    wish = mine.wish(IDLE, UNKNOWN)
    assert (wish.in_flight, wish.budget, wish.load, wish.room) == (0, 1000, 0, 8)


def test_what_waits_for_something_else_is_not_in_flight() -> None:
    """Until it goes on, unless it has ended meanwhile. Saying anything twice changes nothing."""
    mine = admission()
    waiting, ended = mine.deliver(900), mine.deliver(700)
    for one in (waiting, ended, ended):
        mine.pause(one)
    wish = mine.wish(IDLE, UNKNOWN)
    assert (wish.in_flight, wish.budget, wish.load, wish.room) == (0, 1000, 1600, 6)
    mine.end(ended)
    for one in (ended, waiting, waiting):
        mine.go_on(one)
    wish = mine.wish(IDLE, UNKNOWN)
    assert (wish.in_flight, wish.budget, wish.load, wish.room) == (900, 100, 900, 7)
    mine.begin(waiting, 0, None, at=1.0)
    mine.end(waiting)
    assert mine.wish(IDLE, UNKNOWN) == admission().wish(IDLE, UNKNOWN)


def test_with_nothing_in_flight_any_size_is_taken() -> None:
    """And then nothing more, before its first token."""
    mine = admission()
    assert takes_more(mine.wish(IDLE, UNKNOWN))
    huge = mine.deliver(5000)
    assert mine.wish(IDLE, UNKNOWN).budget == 0
    assert not takes_more(mine.wish(IDLE, UNKNOWN))
    mine.begin(huge, 0, None, at=1.0)
    assert takes_more(mine.wish(IDLE, UNKNOWN))


def test_a_prompt_that_is_all_cached_is_in_flight_too() -> None:
    """Its last token is always computed, and a prediction may be too high."""
    mine = admission()
    mine.deliver(64, 96)
    assert mine.wish(IDLE, UNKNOWN).in_flight == 1


def test_what_runs_is_told_by_organization_and_profile() -> None:
    """Of profiles, those with a good part of all that it can run; of what nobody asked for, nothing."""
    mine = admission(max_requests=8)
    hot, cold = Share("acme", "a" * 64, 100), Share("other", "b" * 64, 100)
    taken = [mine.deliver(200, 100, share) for share in (hot, hot, cold, NOBODY)]
    wish = mine.wish(IDLE, UNKNOWN)
    assert wish.seats == 8
    assert set(wish.organizations) == {"acme", "other"}
    assert wish.hot == {"a" * 64: 2, "b" * 64: 1}
    for one in taken[:3]:
        mine.end(one)
    wish = mine.wish(IDLE, UNKNOWN)
    assert (wish.organizations, wish.hot) == ((), {})
    many = admission(max_requests=32)
    for share in (hot, hot, hot, hot, cold):
        many.deliver(200, 100, share)
    assert many.wish(IDLE, UNKNOWN).hot == {"a" * 64: 4}


def test_what_runs_has_memory_that_is_not_free() -> None:
    """Beside its profiles, which are counted once, however many use them."""
    mine, memory = admission(), Memory(capacity_tokens=1000, free_tokens=600)
    assert mine.wish(IDLE, memory).free_tokens == 600
    taken = [mine.deliver(200, 100, Share("acme", "a" * 64, 100)) for _ in range(2)]
    taken.append(mine.deliver(101, 100, Share("", "a" * 64, 100)))
    load = EngineLoad(running=3, kv_usage=0.35)
    assert mine.own_tokens(load, 1000) == 250
    assert mine.wish(load, memory).free_tokens == 350
    assert mine.wish(EngineLoad(running=2, kv_usage=0.9), memory).free_tokens == 0
    for one in taken:
        mine.end(one)
    assert mine.own_tokens(load, 1000) == 350
    assert mine.own_tokens(EngineLoad(running=2), 1000) == 0


def test_no_more_requests_than_the_engine_runs() -> None:
    """However small they are."""
    mine = admission(max_requests=2)
    first, _second = mine.deliver(1), mine.deliver(1)
    assert mine.wish(IDLE, UNKNOWN).room == 0
    mine.end(first)
    assert (mine.in_hand, mine.wish(IDLE, UNKNOWN).room) == (1, 1)


@pytest.mark.parametrize(
    ("load", "capacity", "not_begun", "in_flight", "expected"),
    [
        (EngineLoad(waiting=2), 0, 2, 100, False),
        (EngineLoad(waiting=3), 0, 2, 100, True),
        (EngineLoad(kv_usage=0.97), 0, 0, 0, False),
        (EngineLoad(kv_usage=0.99), 0, 0, 0, True),
        (EngineLoad(kv_usage=0.5), 1000, 1, 470, False),
        (EngineLoad(kv_usage=0.5), 1000, 1, 490, True),
    ],
)
def test_an_engine_without_memory(
    load: EngineLoad, capacity: int, not_begun: int, in_flight: int, expected: bool
) -> None:
    """Its cache is full, or will be of what is in flight; or more sequences wait in it than were just given to it."""
    assert is_full(load, capacity, not_begun, in_flight) is expected


def test_an_old_load_is_not_believed_for_ever() -> None:
    """An engine that was full in its last step, and has nothing now, will not take another step to say so."""
    mine, full = admission(), EngineLoad(running=1, waiting=1, kv_usage=1.0)
    only = mine.deliver(100)
    mine.begin(only, 0, None, at=1.0)
    assert not takes_more(mine.wish(full, UNKNOWN))
    mine.end(only)
    assert takes_more(mine.wish(full, UNKNOWN))


@dataclass
class Waiting:
    """A request that waits, with what the engine is asked."""

    request: GenerationRequest
    taken: Taken | None = None
    begun: bool = False


@pytest.mark.parametrize("seed", range(8))
def test_driven_in_virtual_time(seed: int) -> None:
    """With a cache that holds two prompts, or many: all requests end, and what is in flight stays within the budget, or alone."""
    print(f"seed {seed}")
    draw = random.Random(seed)
    options = SimulationOptions(
        num_blocks=draw.choice((80, 200, 2000)),
        max_num_seqs=draw.choice((2, 16)),
        max_model_len=1200,
        answer_tokens=(1, 60),
    )
    capacity = options.num_blocks * options.block_size
    batch, mine = ContinuousBatch(options), admission(options.max_num_seqs, 800)
    profiles = [[draw.randrange(1000) for _ in range(draw.randrange(64, 900))] for _ in range(6)]
    queue = deque(
        Waiting(GenerationRequest(f"r{n}", [*draw.choice(profiles), n, n], Sampling(max_tokens=60, seed=n), "salt"))
        for n in range(80)
    )
    running: dict[str, Waiting] = {}
    now, idle_steps = 0.0, 0
    while queue or running:
        while queue:
            wish = mine.wish(batch.load, Memory(capacity_tokens=capacity))
            size = len(queue[0].request.prompt_token_ids)
            assert takes_more(wish) == mine.takes_more(batch.load, capacity)
            if not takes_more(wish) or (size > wish.budget and wish.in_flight):
                break
            one = queue.popleft()
            one.taken = mine.deliver(size)
            batch.add(one.request)
            running[one.request.request_id] = one
            in_flight = mine.wish(batch.load, UNKNOWN).in_flight
            assert in_flight <= 800 or in_flight == size, "a request of any size, and alone"
        step = batch.step(now)
        now += max(step.seconds, 1e-6)
        idle_steps = 0 if step.tokens else idle_steps + 1
        assert idle_steps < 100, "it came to a standstill"
        for token in step.tokens:
            one = running[token.sequence.request.request_id]
            assert one.taken is not None
            if not one.begun:
                one.begun = True
                mine.begin(one.taken, token.sequence.cached_tokens, None, now)
            if token.finish_reason is not None:
                mine.end(one.taken)
                del running[one.request.request_id]
    assert mine.in_hand == 0


# --- How fast prompts are computed ----------------------------------------------------------------


def test_the_rate_before_anything_is_measured() -> None:
    """What says nothing changes nothing."""
    rate = PrefillRate()
    assert rate.value == START_RATE
    for tokens, seconds in ((0, 1.0), (100, 0.0), (-5, 1.0)):
        rate.add(tokens, seconds, at=1.0)
    assert rate.value == START_RATE


def test_prompts_of_one_step_are_one_measurement() -> None:
    """Each took as long as all of them."""
    rate = PrefillRate()
    for number in range(40):
        for _ in range(4):
            rate.add(2000, 2.0, at=float(number))
    assert rate.value == pytest.approx(4000, rel=0.01)


def test_a_few_long_prompts_tell_more_than_many_short_ones() -> None:
    """A short one takes as long as a step does anyway: 100 tokens in 10 ms, where 6,000 take 0.25 s."""
    rate, draw = PrefillRate(), random.Random(4)
    for number in range(2000):
        tokens = 6000 if draw.random() < 0.05 else 100
        rate.add(tokens, 0.006 + tokens / 25_000, at=float(number))
    assert rate.value == pytest.approx(25_000, rel=0.05)


def test_the_rate_follows_a_machine_that_became_slower() -> None:
    """After some tens of thousands of tokens."""
    rate = PrefillRate()
    for number in range(50):
        rate.add(4000, 0.16, at=float(number))
    for number in range(50, 75):
        rate.add(4000, 4.0, at=float(number))
    assert rate.value == pytest.approx(1000, rel=0.1)
