"""What an organization does to its agents: make one, add a version, choose the active one.

A version is tried before it becomes active: it is tokenised with the served model, and must leave room for a task and
an answer in the model's context window. Tokenising a large profile takes a processor for seconds, so one is tokenised
at a time, and one that is plainly too long not at all; few may wait for their turn, so that requests find threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from gateway_app.governance.api_keys import Caller
from gateway_app.profiles.active import ActiveProfile
from gateway_app.profiles.changes import Activation, Expectation, ProfileChanges
from gateway_app.profiles.drafts import Draft, NewAgent, NewVersion
from gateway_app.profiles.finder import Profiles
from tasks.errors import NotFound, ProfileExists, ProfileUnusable, ServiceUnavailable
from tasks.prompts.layout import PromptLayout
from tasks.prompts.profile import Profile

#: What a task and its answer take at the very least.
MIN_ROOM_TOKENS = 64
#: Versions that are tried or wait for it, in one process.
MAX_TRYING = 16


@dataclass(frozen=True, slots=True)
class Activated:
    """A version that is active now. `least_prompt_tokens` is the length of a prompt whose task is one letter."""

    active: ActiveProfile
    least_prompt_tokens: int
    context_window: int
    previous_version: int | None


class ProfileEditor:
    """Changes agents. `context_window` is the served model's, in tokens."""

    def __init__(self, profiles: Profiles, changes: ProfileChanges, context_window: int) -> None:
        self._profiles = profiles
        self._changes = changes
        self._context_window = context_window
        self._trying = threading.Lock()
        self._places = threading.BoundedSemaphore(MAX_TRYING)

    def create(self, caller: Caller, draft: NewAgent) -> int:
        """Make an agent; return the number of its version. Raises ProfileExists, ProfileLimit, ProfileUnusable."""
        organization, profile = caller.organization, draft.profile(draft.agent, 1)
        if draft.agent in self._profiles.shipped or self._profiles.store.agent(organization, draft.agent):
            raise ProfileExists(f"there is already an agent named {draft.agent!r}")
        active = self._tried(organization, draft, profile)
        self._changes.create(organization, caller.key_id, profile, self._activation(organization, active))
        self._keep(organization, active, profile)
        return profile.version

    def add(self, caller: Caller, agent: str, draft: NewVersion, states: frozenset[str] | None = None) -> int:
        """Add a version; return its number. `states` are those that the agent may be in, if the caller named any.

        Raises UnknownAgent, VersionConflict, ProfileLimit, ProfileUnusable.
        """
        organization, profile = caller.organization, draft.profile(agent, 1)
        shipped = self._profiles.shipped.get(agent)
        self._known(organization, agent)
        active = self._tried(organization, draft, profile)
        version = self._changes.add(
            organization,
            caller.key_id,
            profile,
            Expectation(draft.base_version, states),
            self._activation(organization, active),
            shipped.version if shipped else 0,
        )
        self._keep(organization, active, profile.model_copy(update={"version": version}))
        return version

    def activate(self, caller: Caller, agent: str, version: int) -> Activated:
        """Make a version the active one. Raises UnknownAgent, NotFound, ProfileUnusable.

        As everywhere here, ServiceUnavailable is raised if too many versions are being tried.
        """
        organization, shipped = caller.organization, self._profiles.shipped.get(agent)
        found = self._profiles.store.find(organization, agent, version)
        if found is None and (shipped is None or shipped.version != version):
            self._known(organization, agent)
            raise NotFound(f"there is no version {version} of {agent!r}")
        with self._turn():
            if found is None:
                active = self._profiles.shipped_version(organization, agent)
            else:
                self._refuse_oversize(found[0])
                active = self._profiles.version(organization, agent, version)
        least = self._fitted(active.layout)
        before = self._changes.activate(organization, caller.key_id, agent, version if found else None)
        previous = before if before is not None else shipped.version if shipped else None
        return Activated(active, least, self._context_window, previous)

    def _known(self, organization: str, agent: str) -> None:
        if agent not in self._profiles.shipped and self._profiles.store.agent(organization, agent) is None:
            raise self._profiles.unknown(organization, agent)

    def _tried(self, organization: str, draft: Draft, profile: Profile) -> ActiveProfile | None:
        """Return the draft as it would be used, if it is to be active at once."""
        if not draft.activate:
            return None
        with self._turn():
            self._refuse_oversize(profile)
            layout = self._profiles.prefixes.usable_layout(profile)
        self._fitted(layout)
        return self._profiles.prefixes.name(organization, profile, layout)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._places.acquire(blocking=False):
            raise ServiceUnavailable("many profiles are being activated at this moment")
        try:
            with self._trying:
                yield
        finally:
            self._places.release()

    def _refuse_oversize(self, profile: Profile) -> None:
        count = self._profiles.prefixes.token_count(profile)
        if count > self._context_window:
            raise self._too_long(count)

    def _fitted(self, layout: PromptLayout) -> int:
        """Return the length of the shortest prompt. Raises ProfileUnusable if it leaves no room."""
        joined, ids = layout.encode([{"role": "user", "content": "x"}])
        least = len(ids) + (len(layout.static_token_ids) if joined else 0)
        if least + MIN_ROOM_TOKENS > self._context_window:
            raise self._too_long(least)
        return least

    def _too_long(self, tokens: int) -> ProfileUnusable:
        return ProfileUnusable(
            f"the profile takes {tokens} tokens and a task with its answer at least {MIN_ROOM_TOKENS}; "
            f"the model's context window is {self._context_window} tokens",
            prompt_tokens=tokens,
            context_window=self._context_window,
        )

    def _activation(self, organization: str, active: ActiveProfile | None) -> Activation | None:
        if active is None:
            return None
        prefixes = self._profiles.prefixes
        return Activation(prefixes.tokenised(organization, active), prefixes.row(organization, active))

    def _keep(self, organization: str, active: ActiveProfile | None, profile: Profile) -> None:
        if active is not None:
            self._profiles.keep(organization, replace(active, profile=profile))
