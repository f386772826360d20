"""Trying a version before requests get it: it is tokenised with the served model, and must leave room for a task.

Tokenising a large profile takes a processor for seconds, so one is tokenised at a time, and one that is plainly too long
not at all; few may wait for their turn, so that requests find threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gateway_app.profiles.active import ActiveProfile
from gateway_app.profiles.finder import Profiles
from tasks.errors import ProfileUnusable, ServiceUnavailable
from tasks.prompts.layout import PromptLayout
from tasks.prompts.profile import Profile

#: What a task and its answer take at the very least.
MIN_ROOM_TOKENS = 64
#: Versions that are tried or wait for it, in one process.
MAX_TRYING = 16


class Trial:
    """Tries versions. `context_window` is the served model's, in tokens."""

    def __init__(self, profiles: Profiles, context_window: int) -> None:
        self.context_window = context_window
        self._profiles = profiles
        self._trying = threading.Lock()
        self._places = threading.BoundedSemaphore(MAX_TRYING)

    def new(self, organization: str, whole: Profile) -> ActiveProfile:
        """Return a profile as it would be used. Raises ProfileUnusable, or ServiceUnavailable if many are tried."""
        with self._turn():
            self._refuse_oversize(whole)
            layout = self._profiles.prefixes.usable_layout(whole)
        self.least_prompt(layout)
        return self._profiles.prefixes.name(organization, whole, layout)

    def stored(self, organization: str, agent: str, version: int, whole: Profile) -> ActiveProfile:
        """Do the same for an own version whose text is settled."""
        with self._turn():
            self._refuse_oversize(whole)
            active = self._profiles.version(organization, agent, version)
        self.least_prompt(active.layout)
        return active

    def shipped(self, organization: str, agent: str) -> ActiveProfile:
        """Do the same for an agent's file."""
        with self._turn():
            active = self._profiles.shipped_version(organization, agent)
        self.least_prompt(active.layout)
        return active

    def least_prompt(self, layout: PromptLayout) -> int:
        """Return how many tokens the shortest prompt has. Raises ProfileUnusable if it leaves no room."""
        joined, ids = layout.encode([{"role": "user", "content": "x"}])
        least = len(ids) + (len(layout.static_token_ids) if joined else 0)
        if least + MIN_ROOM_TOKENS > self.context_window:
            raise self._too_long(least)
        return least

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
        if count > self.context_window:
            raise self._too_long(count)

    def _too_long(self, tokens: int) -> ProfileUnusable:
        return ProfileUnusable(
            f"the profile takes {tokens} tokens and a task with its answer at least {MIN_ROOM_TOKENS}; "
            f"the model's context window is {self.context_window} tokens",
            prompt_tokens=tokens,
            context_window=self.context_window,
        )
