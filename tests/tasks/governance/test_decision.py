"""A decision is made from facts alone, detection only ever raises it, and the record suffices to make it again."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest

from tasks.governance.decision import Detection, Facts, Found, decide, details, facts_of
from tasks.governance.secure_gateway import POLICIES, PROVIDERS, Sensitivity, classify_task
from tasks.schema_governance import DETECTION_MODES

PUBLIC = Facts("coder", "chat")
RANK = {name: rank for rank, name in enumerate(get_args(Sensitivity))}
FOUND = [
    None,
    Found({}, private=False, sensitive=False),
    Found({"email": 2}, private=True, sensitive=False),
    Found({"api_key": 1}, private=False, sensitive=True),
    Found({"api_key": 1, "email": 1}, private=True, sensitive=True),
]
ALL_FACTS = [
    Facts(agent, kind, private, sensitive, security, hint, found)
    for agent, kind in (("coder", "chat"), ("coder", "PLAN"), ("Validator", "chat"))
    for private, sensitive, security in itertools.product([False, True], repeat=3)
    for hint in (None, *PROVIDERS, "elsewhere")
    for found in FOUND
]


def test_the_modes_are_those_of_the_table() -> None:
    """The type, the table and the settings name the same ones."""
    assert get_args(Detection) == DETECTION_MODES


@pytest.mark.parametrize("detection", DETECTION_MODES)
def test_detection_raises_and_never_lowers(detection: Detection) -> None:
    """Whatever is found, whatever the caller said, under every policy: a task is as sensitive as without, or more so."""
    for facts, policy in itertools.product(ALL_FACTS, POLICIES):
        ruling = decide(facts, policy, detection, PROVIDERS)
        without = decide(replace(facts, found=None), policy, detection, PROVIDERS)
        assert RANK[ruling.sensitivity] >= RANK[without.sensitivity]
        if detection in ("off", "record"):
            assert ruling == without
        if without.veto is not None and facts.provider_hint is not None:
            assert ruling.veto is not None


def test_raising_is_as_if_the_caller_had_said_so() -> None:
    """The flags are those that detection sets, or-ed with the caller's; then MetaQore's rules apply."""
    for facts in ALL_FACTS:
        found = facts.found or FOUND[1]
        assert found is not None
        expected = classify_task(
            agent_name=facts.agent_name,
            task_type=facts.task_type,
            has_private_data=facts.private or found.private,
            has_sensitive_data=facts.sensitive or found.sensitive,
            is_security_task=facts.security,
        )
        assert decide(facts, "default_local_first", "raise", PROVIDERS).sensitivity == expected


def test_refusing() -> None:
    """Whatever is found refuses; the veto says which kinds there were, and how many. The policy's own veto goes first."""
    facts = replace(PUBLIC, found=FOUND[4])
    ruling = decide(facts, "default_local_first", "refuse", PROVIDERS)
    assert (ruling.vetoed_by, ruling.sensitivity, ruling.provider) == ("detection", "sensitive", "hmcp_gateway")
    assert ruling.veto is not None
    assert ruling.veto.as_dict() == {
        "reason": "Detected api_key, email, which this organization refuses",
        "policy_violated": "default_local_first",
        "severity": "high",
        "details": {"policy": "default_local_first", "detected": {"api_key": 1, "email": 1}},
    }
    assert ruling.reason == ruling.veto.reason
    elsewhere = decide(replace(facts, provider_hint="openrouter"), "default_local_first", "refuse", PROVIDERS)
    assert elsewhere.reason == "Provider 'openrouter' disallowed for sensitive tasks"
    assert elsewhere.vetoed_by == "policy"
    assert decide(replace(PUBLIC, found=FOUND[1]), "default_local_first", "refuse", PROVIDERS).veto is None


def test_a_refusals_reason_is_bounded() -> None:
    """It fits the column, however many kinds there are; the details have them all."""
    many = Found({f"kind_{'x' * 40}_{number}": 1 for number in range(40)}, private=True, sensitive=True)
    ruling = decide(replace(PUBLIC, found=many), "default_local_first", "refuse", PROVIDERS)
    assert ruling.veto is not None
    assert len(ruling.reason) <= 500
    assert len(ruling.veto.details["detected"]) == 40


def test_providers_go_by_priority_and_status() -> None:
    """The first that is allowed and up; with none, the first is reported as down."""
    for up, policy, sensitive, expected in (
        (PROVIDERS, "default_local_first", False, "hmcp_gateway"),
        (("openrouter", "ollama"), "default_local_first", False, "ollama"),
        (("openrouter",), "default_local_first", False, "openrouter"),
        (("openrouter",), "default_local_first", True, None),
        (("openrouter",), "compliance_local_only", False, None),
        ((), "default_local_first", False, None),
    ):
        ruling = decide(replace(PUBLIC, sensitive=sensitive), policy, "off", up)
        if expected is None:
            assert (ruling.vetoed_by, ruling.reason) == ("policy", "Provider 'hmcp_gateway' unavailable")
        else:
            assert (ruling.provider, ruling.reason, ruling.veto) == (expected, "auto_recommendation", None)


@pytest.mark.parametrize("detection", DETECTION_MODES)
def test_the_record_suffices(detection: Detection) -> None:
    """What an event holds gives the same decision again, by every policy, through JSON and back."""
    for facts in ALL_FACTS:
        # Nothing is looked for if detection is off, and only then.
        scanned = replace(facts, found=None if detection == "off" else facts.found or FOUND[1])
        held = json.loads(json.dumps(details(scanned, detection, 7)))
        assert held["policy_version"] == 7
        event = SimpleNamespace(agent_name=facts.agent_name, task_type=facts.task_type, details=held)
        assert facts_of(event) == scanned


@pytest.mark.parametrize("held", [None, {}, {"veto": {"reason": "x"}}, {"psmp": {}}])
def test_events_of_the_release_before(held: dict[str, object] | None) -> None:
    """They hold no facts, which is told and not guessed."""
    assert facts_of(SimpleNamespace(agent_name="coder", task_type="chat", details=held)) is None
