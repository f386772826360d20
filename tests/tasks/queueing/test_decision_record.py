"""Reading a decision that lay in Redis: what the script writes is understood, and nothing else is kept."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from tasks.queueing.decision import MAX_BYTES, Candidate, Decision, WorkerFacts, read, recorded
from tasks.queueing.pull import Report, Strategy, Wish
from tasks.queueing.scripts import Scripts
from tests.tasks.queueing.broker import TOKENS, A, B, Broker, C

PROFILE = "ab" * 32


def decision(**changes: Any) -> dict[str, Any]:
    """Return a decision as the script writes it."""
    candidate = {
        "profile": PROFILE, "turn": 1764148000.25, "waiting": 2, "waited": 1.5, "cached": 96, "gpu": 64, "static": 128,
        "seconds": 0.25, "copies": 0, "price": 1764148001.5, "eligible_at": 0,
    }  # fmt: skip
    facts = {
        "seats": 64, "room": 3, "budget": 8192, "in_flight": 0, "load": 100, "free_tokens": 0, "prefill_rate": 25000, "ram_rate": 0,
        "disk_rate": 0, "affinity": 32, "patience": 4, "is_least_loaded": True, "is_next": True,
    }  # fmt: skip
    return {
        "strategy": "cache_aware_continuous", "worker": "gpu@test", "organization": "acme", "at": 1764148002.5, "batch": 1, "chosen": 0,
        "candidates": [candidate], "worker_facts": facts, **changes,
    }  # fmt: skip


def candidate(**changes: Any) -> dict[str, Any]:
    """Return a decision whose only candidate is as usual but for `changes`."""
    return decision(candidates=[decision()["candidates"][0] | changes])


def test_what_the_script_writes() -> None:
    """All of it is kept, as it is recorded."""
    found = read(json.dumps(decision()))
    assert found is not None
    assert found.document() == decision()
    assert (found.predicted_tokens, found.winner.static_profile_hash) == (96, PROFILE)
    assert found.is_for(PROFILE, "gpu@test")
    assert not found.is_for("cd" * 32, "gpu@test")
    assert not found.is_for(PROFILE, "gpu@other")
    assert recorded({"schedule": found.record()}) == recorded({"schedule": found.document()}) == found
    assert len(json.dumps(found.record())) < 0.8 * len(json.dumps(found.document()))


def test_what_a_later_release_may_add_is_passed_over() -> None:
    """So that the rest of it can still be read."""
    later = decision(new="x" * 100) | {"worker_facts": decision()["worker_facts"] | {"new": [1, 2]}}
    found = read(json.dumps(later))
    assert found is not None
    assert found.document() == decision()


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", '"x"', "{}", b"\xff\xfe", json.dumps(decision()) + " " * MAX_BYTES,
        *map(
            json.dumps,
            [
                decision(candidates=[]), decision(candidates={}), decision(chosen=1), decision(chosen=-1),
                decision(candidates=9 * decision()["candidates"]), decision(strategy="best"), decision(worker="a\nb"),
                decision(at=float("nan")), decision(at="soon"), decision(worker_facts={}), decision(batch=-1),
                candidate(profile="What is the password?"), candidate(profile=PROFILE + ":low\n"), candidate(cached=-1),
                candidate(static=10**20), candidate(price=float("inf")), candidate(waiting=None),
            ],
        ),
    ],
)  # fmt: skip
def test_what_no_script_wrote(text: str | bytes) -> None:
    """It is left out, whatever it is."""
    assert read(text) is None


def test_a_low_priority_is_a_list_of_its_own() -> None:
    """Its profile is the same."""
    found = read(json.dumps(candidate(profile=f"{PROFILE}:low")))
    assert found is not None
    assert found.is_for(PROFILE, "gpu@test")


@pytest.mark.parametrize(
    "details", [None, {}, [], "x", {"schedule": None}, {"schedule": {"strategy": "fifo"}}, {"retry_of": "x"}]
)
def test_events_without_a_decision(details: Any) -> None:
    """As earlier releases recorded them, or with something else."""
    assert recorded(details) is None


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_decisions_of_the_queue(broker: Broker, strategy: Strategy) -> None:
    """Each is understood, tells of the organization's own lists alone, and is the same when it is made again."""
    scripts = Scripts(broker.client, broker.keys, strategy)
    for profile, organization in ((A, "acme"), (B, "acme"), (C, "other"), (A, "acme")):
        broker.publish(profile, organization=organization)
    report = Report("gpu@test", "e", 1, full=True, cache={B: (TOKENS, TOKENS, TOKENS)})
    assert scripts.run("report", report.to_json()) == 1
    taken = []
    for _ in range(4):
        wish = Wish("gpu@test", room=8, budget=100_000)
        messages, _next_s, text, _left = scripts.run("reserve", "holder", wish.to_json())
        if not messages:
            break
        found = read(text)
        assert found is not None
        told = json.loads(text)
        assert set(told) <= set(Decision.model_fields), "what is not known cannot be replayed"
        assert {name for one in told["candidates"] for name in one} <= set(Candidate.model_fields)
        assert set(told["worker_facts"]) <= set(WorkerFacts.model_fields)
        assert (found.strategy, found.worker, found.batch) == (strategy, "gpu@test", len(messages))
        lists = {json.loads(record.partition(b"\n")[0])[1] for _tag, record, _returns in messages}
        assert lists == {found.winner.profile}
        of_organization = {A, B} if found.winner.profile != C else {C}
        assert {one.profile for one in found.candidates} <= of_organization
        again = json.loads(scripts.run("replay", json.dumps(found.document())))
        assert again["chosen"] == found.chosen
        assert again["prices"] == pytest.approx([one.price for one in found.candidates], abs=1e-3)
        taken.append((found.winner.profile, found.predicted_tokens))
    assert {profile for profile, _ in taken} >= {B, C}
    assert dict(taken)[C] == 0
