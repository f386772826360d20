"""Workers pull what is best run there: real ones, on the simulated engine, and the decisions that they leave behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway_app.requests.explain import Attempt, attempts
from tests.services import wait_until
from tests.worker_gpu.site import END_S, Site, site


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return which it is: databases make no difference here."""
    kind: str = request.param
    return kind


pytestmark = pytest.mark.usefixtures("configured")


def last_attempts(made: Site, ids: list[str]) -> list[Attempt]:
    """Return the attempt that answered each request, in the order in which they began."""
    found = [attempts(made.database, one, "default")[-1] for one in ids]
    return sorted(found, key=lambda attempt: attempt.started_at)


def test_siblings_of_a_cold_profile_wait_for_the_first(tmp_path: Path) -> None:
    """One computes the profile, and the others go together when it is computed: what the queue expects, the engine finds.

    What the queue knows of a worker is gone when it has ended.
    """
    with site(tmp_path) as made:
        ids = [made.submit(f"Question {number}", max_tokens=4) for number in range(6)]
        worker = made.start("gpu", options={"prefill_tokens_per_s": 4000})
        made.wait_until_ready("gpu")
        made.check_ends(ids)
        first, *others = last_attempts(made, ids)
        assert first.decision is not None
        assert (first.decision.predicted_tokens, first.cached_tokens, first.decision.batch) == (0, 0, 1)
        static = first.decision.winner.static
        for other in others:
            assert other.decision is not None
            assert (other.decision.predicted_tokens, other.decision.batch) == (static, 5)
            assert other.cached_tokens is not None
            assert static - other.cached_tokens < 16
        copies = made.keys.named(f"copies:{first.decision.winner.profile}")
        assert made.redis.hgetall(copies) == {b"gpu@test": f"held {static}".encode()}
        worker.stop()
        assert not made.redis.exists(copies, made.keys.named("cache:gpu@test"))
        assert made.redis.zscore(made.keys.named("alive"), "gpu@test") is None


def test_a_worker_asks_again_as_soon_as_it_can(tmp_path: Path) -> None:
    """When a first token comes, and when a request ends; if it did not, each of these would wait for the one before it.

    The engine runs 8 requests at once, of most of a second each; the budget admits their prompts one after the other.
    """
    with site(tmp_path) as made:
        variables = {"ENGINE__MAX_NUM_SEQS": "8", "SCHEDULING__MAX_BATCH_TOKENS": "32"}
        made.start("gpu", options={"tokens_per_s_per_sequence": 40}, **variables)
        made.wait_until_ready("gpu")
        ids = [made.submit(f"Question {number}", max_tokens=30) for number in range(32)]
        wait_until(lambda: all(row.state == "completed" for row in made.rows(*ids)), END_S, "all to end")
