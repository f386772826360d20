"""The cache is the schedule: real workers on simulated engines pull what they hold, share a crowd, and stand in for the dead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.enginelab.prompts import write_agent
from gateway_app.requests.explain import Attempt, attempts
from tasks.settings import PREFIX, settings
from tests.worker_gpu.site import Site, site

CROWDED, LONELY = AGENTS = ("crowded", "lonely")
BLOCK = 16
#: A profile takes most of a second to compute, and a token a twentieth.
ENGINE: dict[str, Any] = {"prefill_tokens_per_s": 1000, "tokens_per_s_per_sequence": 20, "block_size": BLOCK}
SLOTS = {"ENGINE__MAX_NUM_SEQS": "2"}


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return which it is: databases make no difference here."""
    kind: str = request.param
    return kind


@pytest.fixture
def configured(configured: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have two agents whose profiles have nothing in common, each some hundred tokens long."""
    (profiles := tmp_path / "profiles").mkdir()
    for agent in AGENTS:
        write_agent(profiles, agent, f"The {agent} agent tells what it knows of that. " * 40)
    monkeypatch.setenv(f"{PREFIX}GOVERNANCE__PROFILES_DIRECTORY", str(profiles))
    settings.cache_clear()


pytestmark = pytest.mark.usefixtures("configured")


def submit(made: Site, agent: str, number: int, tokens: int = 2) -> str:
    """Return a new task's id."""
    sampling = {"seed": number, "max_tokens": tokens}
    task = {"agent": agent, "directive": f"Question {number}", "sampling": sampling}
    answer = made.client.post("/v1/tasks", json=task)
    assert answer.status_code == 202, answer.text
    return str(answer.get_json()["id"])


def completed(made: Site, ids: Sequence[str]) -> list[Attempt]:
    """Wait until all are; return the attempt that answered each."""
    made.check_ends(list(ids))
    return [attempts(made.database, one, "default")[-1] for one in ids]


def is_hit(attempt: Attempt) -> bool:
    """Tell whether the whole profile was cached, but for what fills no block."""
    assert attempt.decision is not None
    assert attempt.cached_tokens is not None
    return attempt.decision.winner.static - attempt.cached_tokens < BLOCK


def test_profiles_stay_a_crowd_spreads_and_the_dead_are_stood_in_for(tmp_path: Path) -> None:
    """A few requests wait for the worker that has their profile; many run on both; once it is dead, another runs them."""
    with site(tmp_path) as made:
        for name in ("one", "two"):
            made.start(name, options=ENGINE, **SLOTS)
        made.wait_until_ready("one", "two")

        cold = [submit(made, CROWDED, 0)]
        made.wait_for_states(cold, "running")
        cold.append(submit(made, LONELY, 0))
        first = dict(zip(AGENTS, completed(made, cold), strict=True))
        assert not any(map(is_hit, first.values()))
        assert first[CROWDED].worker != first[LONELY].worker

        # Each has more to do than slots, and the other has free ones: who only looks for room would take it there.
        mixed = [agent for agent in AGENTS for _ in range(4)]
        for agent, attempt in zip(mixed, completed(made, [submit(made, agent, 1) for agent in mixed]), strict=True):
            assert attempt.worker == first[agent].worker
            assert is_hit(attempt)

        crowd = completed(made, [submit(made, CROWDED, number, 10) for number in range(10, 26)])
        assert {attempt.worker for attempt in crowd} == {"one@test", "two@test"}
        copied = [attempt for attempt in crowd if not is_hit(attempt)]
        assert {attempt.worker for attempt in copied} == {"one@test", "two@test"} - {first[CROWDED].worker}
        # Two of them may have been begun together, since each worker has two slots.
        assert len(copied) <= 2

        victim = next(worker for worker in made.started if worker.name == first[LONELY].worker)
        victim.kill()
        [attempt] = completed(made, [submit(made, LONELY, 40)])
        assert attempt.worker != first[LONELY].worker


def test_the_strategy_is_a_setting(tmp_path: Path) -> None:
    """Each worker decides by its own; `fifo` takes what has waited longest, whatever is cached."""
    with site(tmp_path) as made:
        strategies = ("fifo", "least_loaded")
        for strategy in strategies:
            made.start(strategy, options=ENGINE, SCHEDULING__STRATEGY=strategy, **SLOTS)
        made.wait_until_ready(*strategies)
        ids = [submit(made, AGENTS[number % 2], number) for number in range(12)]
        decided: dict[str, list[Attempt]] = {}
        for attempt in completed(made, ids):
            decided.setdefault(str(attempt.worker).partition("@")[0], []).append(attempt)
        assert decided.keys() == set(strategies)
        for strategy, found in decided.items():
            assert {attempt.decision.strategy for attempt in found if attempt.decision} == {strategy}
        for attempt in decided["fifo"]:
            assert attempt.decision is not None
            candidates = attempt.decision.candidates
            assert attempt.decision.winner.turn == min(candidate.turn for candidate in candidates)
