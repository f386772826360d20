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
from gateway_app.profiles.shipped import check_versions
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
        self.shipped_at = shipped_at or now()
        self.store = ProfileStore(database, keys)
        self.prefixes = Prefixes(tokenizer, model_name=model_name, salt=salt, database=database, keys=keys)
        self._layouts = {name: self.prefixes.layout(profile) for name, profile in self.shipped.items()}
        self._cold = self.prefixes.layout(NO_PROFILE)
        self._kept: OnceCache[tuple[str, str, int], ActiveProfile] = OnceCache(MAX_KEPT, MAX_KEPT_BYTES, _weight)

    def get(self, organization: str, agent: str) -> ActiveProfile:
        """Return the agent's active profile, stored for the workers. Raises UnknownAgent, listing known names.

        ProfileUnusable is raised if another model is served now, whose template does not take the active version.
        """
        version = self.store.active_version(organization, agent)
        if version is not None:
            return self.version(organization, agent, version)
        if agent in self.shipped:
            return self.shipped_version(organization, agent)
        raise self.unknown(organization, agent)

    def cold(self, organization: str) -> ActiveProfile:
        """Return what requests without an agent have in common: nothing but the hash that they are queued by."""
        return self._kept.get((organization, "", _SHIPPED), lambda: self._cold_of(organization))

    def names(self, organization: str) -> list[tuple[str, datetime]]:
        """Return the agents that the organization's requests may name, in order, with when each was made."""
        known = dict(self.store.active_names(organization)) | dict.fromkeys(self.shipped, self.shipped_at)
        return sorted(known.items())

    def unknown(self, organization: str, agent: str) -> UnknownAgent:
        """Return the error for a name that no agent of the organization has; it lists those that some have."""
        names = [name for name, _ in self.names(organization)]
        return UnknownAgent(f"no active profile is named {agent!r}", agents=names[:MAX_NAMES_SHOWN])

    def version(self, organization: str, agent: str, version: int) -> ActiveProfile:
        """Return a version of the organization's own, active or not. Raises UnknownAgent, ProfileUnusable."""
        return self._kept.get((organization, agent, version), lambda: self._tokenise(organization, agent, version))

    def shipped_version(self, organization: str, agent: str) -> ActiveProfile:
        """Return the shipped version of an agent that has one, as the organization uses it."""
        return self._kept.get((organization, agent, _SHIPPED), lambda: self._shipped(organization, agent))

    def name_shipped(self, organization: str, agent: str) -> ActiveProfile:
        """Return the same without storing anything: for those who only look."""
        return self.prefixes.name(organization, self.shipped[agent], self._layouts[agent])

    def keep(self, organization: str, active: ActiveProfile) -> None:
        """Have a version at hand that was tokenised before it had its number."""
        self._kept.put((organization, active.profile.agent, active.profile.version), active)

    def _tokenise(self, organization: str, agent: str, version: int) -> ActiveProfile:
        found = self.store.find(organization, agent, version)
        if found is None:
            raise UnknownAgent(f"there is no version {version} of {agent!r}")
        profile, stored = found
        active = self.prefixes.name(organization, profile, self.prefixes.usable_layout(profile))
        self.prefixes.store(organization, active)
        outcome = self.prefixes.tokenised(organization, active)
        if outcome != stored.tokenised:
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
