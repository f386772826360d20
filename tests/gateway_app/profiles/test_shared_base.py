"""With a worker: the first request of one role finds the base in the KV cache that another role's request left there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from gateway_app.profiles.rows import Pin
from gateway_app.profiles.sealing import Inherited
from tasks.prompts.chain import hash_chain
from tasks.prompts.profile import Profile, Segment
from tests.serving import Served, standing

HOUSE = "You work for the house, and answer in whole sentences. " * 12


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    """Return a gateway with a simulated worker, whose cache works as a real one's does."""
    # Nothing is computed before a request asks for it.
    variables = {"ENGINE__OPTIONS": '{"time_scale": 0}', "PROFILES__WARM_COPIES": "0"}
    with standing(tmp_path_factory.mktemp("gateway"), tiny_model, **variables) as made:
        yield made


def post(served: Served, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Post a body that must be taken."""
    answer = requests.post(f"{served.url}{path}", json=body, headers=served.headers, timeout=60)
    assert answer.ok, answer.text
    found: dict[str, Any] = answer.json()
    return found


def agent(served: Served, name: str, **fields: Any) -> dict[str, Any]:
    """Make an agent with an active version."""
    return post(served, "/v1/profiles", {"agent": name, "activate": True, **fields})


def usage(served: Served, name: str) -> tuple[int, int]:
    """Ask an agent, and return the tokens of the prompt and those of them that were cached."""
    asked = {"model": name, "messages": [{"role": "user", "content": f"Who is {name}?"}], "max_tokens": 4}
    used = post(served, "/v1/chat/completions", asked)["usage"]
    return used["prompt_tokens"], used["prompt_tokens_details"]["cached_tokens"]


def test_roles_share_their_base_in_the_cache(served: Served) -> None:
    """And an agent with the same words in another base shares nothing but the template's first tokens."""
    house = agent(served, "house", abstract=True, segments=[{"kind": "agent_base_profile", "text": HOUSE}])
    examples = [{"user": "Rhyme.", "assistant": "Time."}]
    shots = {"kind": "few_shot", "examples": examples}
    agent(served, "poet", extends="house", segments=[{"kind": "role", "text": "Poet."}, shots])
    agent(served, "painter", extends="house", segments=[{"kind": "role", "text": "Painter."}])
    agent(served, "other", segments=[{"kind": "agent_base_profile", "text": "Elsewhere. " + HOUSE}])
    _, cold = usage(served, "poet")
    prompt, shared = usage(served, "painter")
    _, other = usage(served, "other")
    block = 16
    assert cold == 0
    assert house["static_token_count"] - 2 * block < shared < prompt
    assert other < block


def test_roles_share_the_links_of_their_base() -> None:
    """Chain hashes are equal up to where the base ends, and none after: what a cache index is keyed by."""
    base = Profile(agent="house", version=1, segments=(Segment(kind="agent_base_profile", text=HOUSE),))
    inherited = Inherited(base.segments, (Pin("house", 1),))
    chains = []
    for name in ("poet", "painter"):
        own = Profile(agent=name, version=1, extends="house", segments=(Segment(kind="role", text=name),))
        whole = inherited.before(own)
        chains.append(hash_chain(b"salt", [(segment.kind, segment.content) for segment in whole.segments]))
    (one, other) = chains
    assert (one[0], len(one)) == (other[0], 2)
    assert one[1].hash != other[1].hash


def test_a_canary_with_a_worker(served: Served) -> None:
    """Figures of requests that really ran."""
    agent(served, "writer", segments=[{"kind": "role", "text": "One."}])
    post(served, "/v1/profiles/writer/versions", {"segments": [{"kind": "role", "text": "Two."}]})
    headers = served.headers
    body = {"version": 2, "share": 0.5}
    url = f"{served.url}/v1/profiles/writer/canary"
    assert requests.put(url, json=body, headers=headers, timeout=60).ok
    for _ in range(10):
        usage(served, "writer")
    shown = requests.get(url, headers=headers, timeout=60).json()
    both = shown["active"], shown["canary"]
    assert sum(each["requests"] for each in both) == 10
    for each in both:
        assert each["completed"] == each["requests"]
        assert (each["first_token_ms"] is None) == (each["requests"] == 0)
        assert each["output_tokens"] <= 4 * each["requests"]
