"""Finds the profile that an agent's requests get. This is the part in the path of requests.

Which version is active is read with each request, so that a change holds at once in all gateway processes: one read
by key. The rest is kept in memory by version, since a version never changes: tokenising happens when one is activated,
and else only when a process meets it for the first time.

Shipped files are the base layer: every organization has them until it activates a version of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from gateway_app.profiles.active import NO_PROFILE, ActiveProfile, Prefixes
from gateway_app.profiles.cache import OnceCache
from gateway_app.profiles.canary import gets_canary
from gateway_app.profiles.rows import Agent, Pin
from gateway_app.profiles.shipped import check_versions, shipped_inheritance
from gateway_app.profiles.store import ProfileStore
from tasks.crypto import KeyWrapper
from tasks.db import Database, now
from tasks.errors import UnknownAgent
from tasks.prompts.profile import Profile
from tasks.prompts.tokenizer import ModelTokenizer

MAX_KEPT = 1024
#: Profiles in memory, estimated. Ids are Python integers of 28 bytes and 8 for each reference.
MAX_KEPT_BYTES = 256 * 2**20
_BYTES_A_TOKEN = 36
#: Names shown to somebody who asked for an agent that there is not.
MAX_NAMES_SHOWN = 100
#: What stands for the shipped version in keys of the cache.
_SHIPPED = 0


class Profiles:
    """Every organization's agents. `agents` are the shipped profiles by name, `shipped_at` when they last changed.

    `model_name` is the name the hash chain knows the model by; `salt` is the secret that organizations' salts are
    derived from. Raises ConfigurationError if a shipped profile has too large a version, or the model's template does
    not take it.
    """

    def __init__(
        self,
        agents: Mapping[str, Profile],
        tokenizer: ModelTokenizer,
        *,
        model_name: str,
        salt: bytes,
        database: Database,
        keys: KeyWrapper,
        shipped_at: datetime | None = None,
    ) -> None:
        check_versions(agents)
        self.shipped = dict(agents)
        self.inherited = shipped_inheritance(agents)
        self.shipped_at = shipped_at or now()
        self.store = ProfileStore(database, keys)
        self.prefixes = Prefixes(tokenizer, model_name=model_name, salt=salt, database=database, keys=keys)
        self._layouts = {name: self.prefixes.layout(self.shipped_whole(name)) for name in self.shipped}
        self._cold = self.prefixes.layout(NO_PROFILE)
        self._kept: OnceCache[tuple[str, str, int], ActiveProfile] = OnceCache(MAX_KEPT, MAX_KEPT_BYTES, _weight)

    def get(self, organization: str, agent: str, request_id: str) -> ActiveProfile:
        """Return what the request gets of the agent, stored for the workers: its active version, or its canary.

        Raises UnknownAgent, listing known names, also for an agent that is retired or abstract. ProfileUnusable is
        raised if another model is served now, whose template does not take the version.
        """
        found = self.store.agent(organization, agent)
        version = found.active_version if found else None
        active: ActiveProfile | None = None
        if found and found.canary_share is not None and self._canary_takes(found, request_id):
            version = found.canary_version or None
        if version is not None:
            active = self.version(organization, agent, version)
        elif agent in self.shipped and (found is None or found.retired_at is None):
            active = self.shipped_version(organization, agent)
        if active is None or active.profile.abstract:
            raise self.unknown(organization, agent)
        return active

    def _canary_takes(self, agent: Agent, request_id: str) -> bool:
        if agent.canary_version is None or (agent.canary_version == 0 and agent.agent_name not in self.shipped):
            return False
        return gets_canary(agent.agent_name, agent.canary_version, agent.canary_share or 0.0, request_id)

    def current_number(self, organization: str, agent: str) -> int | None:
        """Return the number of the agent's active version, None if it has none."""
        found = self.store.agent(organization, agent)
        return found.current(self.shipped_number(agent)) if found else self.shipped_number(agent) or None

    def current(self, organization: str, agent: str) -> tuple[Profile, int, tuple[Pin, ...]] | None:
        """Return the agent's active version with what it inherits: as a whole, its number, and what that is pinned to.

        None if it has none.
        """
        found = self.store.agent(organization, agent)
        if found is not None and found.active_version is not None:
            stored = self.store.find(organization, agent, found.active_version)
            if stored is None or stored.whole is None:
                return None
            return stored.whole, stored.version.number, stored.version.pins or ()
        if agent not in self.shipped or (found is not None and found.retired_at is not None):
            return None
        return self.shipped_whole(agent), self.shipped[agent].version, self.inherited[agent].pins

    def shipped_number(self, agent: str) -> int:
        """Return the number of the agent's file, 0 if there is none."""
        return self.shipped[agent].version if agent in self.shipped else 0

    def shipped_whole(self, agent: str) -> Profile:
        """Return an agent's file with what it inherits from others."""
        return self.inherited[agent].before(self.shipped[agent])

    def cold(self, organization: str) -> ActiveProfile:
        """Return what requests without an agent have in common: nothing but the hash that they are queued by."""
        return self._kept.get((organization, "", _SHIPPED), lambda: self._cold_of(organization))

    def names(self, organization: str) -> list[tuple[str, datetime]]:
        """Return the agents that the organization's requests may name, in order, with when each was made."""
        own = self.store.callable_names(organization)
        changed = {name for name, _, _ in own}
        files = {
            name: self.shipped_at
            for name, profile in self.shipped.items()
            if name not in changed and not profile.abstract
        }
        made = {name: self.shipped_at if name in self.shipped else at for name, at, callable_ in own if callable_}
        return sorted((files | made).items())

    def unknown(self, organization: str, agent: str) -> UnknownAgent:
        """Return the error for a name that no agent of the organization has; it lists those that some have."""
        names = [name for name, _ in self.names(organization)]
        return UnknownAgent(f"no active profile is named {agent!r}", agents=names[:MAX_NAMES_SHOWN])

    def known(self, organization: str, agent: str) -> None:
        """Raise UnknownAgent unless the organization has such an agent, in use or not."""
        if agent not in self.shipped and self.store.agent(organization, agent) is None:
            raise self.unknown(organization, agent)

    def version(self, organization: str, agent: str, version: int) -> ActiveProfile:
        """Return a version of the organization's own, active or not. Raises UnknownAgent, ProfileUnusable."""
        return self._kept.get((organization, agent, version), lambda: self._tokenise(organization, agent, version))

    def shipped_version(self, organization: str, agent: str) -> ActiveProfile:
        """Return the shipped version of an agent that has one, as the organization uses it."""
        return self._kept.get((organization, agent, _SHIPPED), lambda: self._shipped(organization, agent))

    def name_shipped(self, organization: str, agent: str) -> ActiveProfile:
        """Return the same without storing anything: for those who only look."""
        return self.prefixes.name(organization, self.shipped_whole(agent), self._layouts[agent])

    def keep(self, organization: str, active: ActiveProfile) -> None:
        """Have a version at hand that was tokenised before it had its number."""
        self._kept.put((organization, active.profile.agent, active.profile.version), active)

    def _tokenise(self, organization: str, agent: str, version: int) -> ActiveProfile:
        found = self.store.find(organization, agent, version)
        if found is None or found.whole is None:
            raise UnknownAgent(f"there is no version {version} of {agent!r} that was ever active")
        active = self.prefixes.name(organization, found.whole, self.prefixes.usable_layout(found.whole))
        self.prefixes.store(organization, active)
        outcome = self.prefixes.tokenised(organization, active)
        if outcome != found.version.tokenised:
            self.store.remember(organization, agent, version, outcome)
        return active

    def _shipped(self, organization: str, agent: str) -> ActiveProfile:
        active = self.name_shipped(organization, agent)
        self.prefixes.store(organization, active)
        return active

    def _cold_of(self, organization: str) -> ActiveProfile:
        active = self.prefixes.name(organization, NO_PROFILE, self._cold)
        self.prefixes.store(organization, active)
        return active


def _weight(active: ActiveProfile) -> int:
    return len(active.profile.text) + _BYTES_A_TOKEN * active.static_token_count
