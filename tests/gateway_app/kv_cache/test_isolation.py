"""Two organizations run the same profile on one worker: neither can tell by anything it is shown, or by how long it takes.

The engine is the simulated one, whose prefill takes the time that its uncached tokens need, to the microsecond, whatever
else the machine does. So times are compared as ratios: another organization's cold start takes as long as one's own, and
a prefix that was computed for oneself a small part of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests

from gateway_app.governance.api_keys import ApiKeys
from tasks.db import Database
from tasks.settings import DatabaseGroup, SecretsGroup
from tests.gateway_app.kv_cache.reported import HOUSE
from tests.services import wait_until
from tests.serving import standing

PROFILES = 4
#: Prompt tokens a second: so slow that a profile takes most of a second, beside which all else is short.
SPEED = 1500
PATIENCE_S = 60.0


class Organization:
    """A client of one organization, of the gateway at `url` that has what it keeps in `folder`."""

    def __init__(self, url: str, folder: Path, name: str) -> None:
        with closing(Database(DatabaseGroup(url=f"sqlite:///{folder / 'gateway.db'}"))) as database:
            peppers = SecretsGroup(directory=folder / "secrets").keys("key_pepper")
            _, key = ApiKeys(database, peppers).create(name, "test", "admin")
        self._url = url
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {key}"

    def make(self, agent: str, text: str) -> None:
        """Make an agent that requests get."""
        parts = [{"kind": "agent_base_profile", "text": text}, {"kind": "role", "text": "Poet."}]
        body = {"agent": agent, "segments": parts, "activate": True}
        self._json(self._session.post(f"{self._url}/v1/profiles", json=body, timeout=PATIENCE_S))

    def ask(self, agent: str) -> tuple[int, float, float]:
        """Ask an agent; return the cached tokens, the time of prefill, and the time to the first token, both in ms."""
        body = {"agent": agent, "directive": "Rhyme.", "sampling": {"max_tokens": 2}}
        url = f"{self._url}{self._json(self._session.post(f'{self._url}/v1/tasks', json=body, timeout=60))['links']['self']}"

        def task() -> dict[str, Any]:
            return self._json(self._session.get(url, timeout=PATIENCE_S))

        wait_until(lambda: task()["status"] == "completed", PATIENCE_S, "an answer")
        result = task()["result"]
        timings = result["timings"]
        return result["usage"]["cached_tokens"], timings["prefill_ms"], timings["first_token_ms"]

    def cache(self) -> dict[str, Any]:
        """Return all that it is shown of the caches."""
        return self._json(self._session.get(f"{self._url}/v1/cache", timeout=PATIENCE_S))

    def held(self, agent: str) -> bool:
        """Tell whether it is shown that a worker holds all of an agent's profile."""
        (entry,) = [each for each in self.cache()["data"] if each.get("agent") == agent]
        return [copy["tier"] for copy in entry["copies"]] == ["gpu"]

    def _json(self, answer: requests.Response) -> dict[str, Any]:
        assert answer.ok, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest.fixture(scope="module")
def organization(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Callable[[str], Organization]]:
    """Return what makes an organization's client of a gateway with one worker, which computes nothing that nobody asks."""
    options = {"ENGINE__OPTIONS": f'{{"prefill_tokens_per_s": {SPEED}}}', "PROFILES__WARM_COPIES": "0"}
    folder = tmp_path_factory.mktemp("gateway")
    with standing(folder, tiny_model, **options) as served:
        yield lambda name: Organization(served.url, folder, name)


def test_neither_tells_that_the_other_was_there(organization: Callable[[str], Organization]) -> None:
    """Not by cached tokens, nor by what the cache shows, nor by the time; each does tell of oneself."""
    alpha, beta = organization("alpha"), organization("beta")
    agents = [f"poet-{number}" for number in range(PROFILES)]
    for agent in agents:
        for each in (alpha, beta):
            each.make(agent, f"{agent}. {HOUSE}")
    wait_until(lambda: beta.cache()["workers"], PATIENCE_S, "a report")
    unused = beta.cache()
    assert all(entry["copies"] == [] for entry in unused["data"])

    first = {agent: alpha.ask(agent) for agent in agents}
    wait_until(lambda: all(alpha.held(agent) for agent in agents), PATIENCE_S, "a report")
    # What alpha had computed changes nothing that beta sees, and no time.
    assert beta.cache() == unused
    others = {agent: beta.ask(agent) for agent in agents}
    again = {each: {agent: each.ask(agent) for agent in agents} for each in (alpha, beta)}

    for agent in agents:
        (cached, prefill, _), (others_cached, others_prefill, others_first) = first[agent], others[agent]
        assert (cached, others_cached) == (0, 0)
        assert others_prefill / prefill == pytest.approx(1.0, abs=0.01)
        # The first token is not there before what was not cached is computed.
        assert others_first >= prefill
        for each in (alpha, beta):
            own_cached, own_prefill, _ = again[each][agent]
            assert own_cached > 0
            assert own_prefill / prefill < 0.5


def test_hits_are_ones_own(organization: Callable[[str], Organization]) -> None:
    """What others found is not counted, and what oneself found is, in the end."""
    gamma, delta = organization("gamma"), organization("delta")
    for each in (gamma, delta):
        each.make("painter", f"Painters. {HOUSE}")
    for _ in range(2):
        gamma.ask("painter")

    def counted(client: Organization) -> tuple[int, int]:
        (entry,) = client.cache()["data"]
        return entry["requests"], entry["hits"]

    wait_until(lambda: counted(gamma) == (2, 1), PATIENCE_S, "counts")
    assert counted(delta) == (0, 0)
