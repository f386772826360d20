"""How projects stand, as a running MetaQore tells it, for any thread and within a time limit.

A caller gets the project's snapshot from the cache, or waits for the one call that fetches it, never longer than the
timeout. The snapshot is fetched on an event loop and through a circuit breaker, and is kept for seconds; a failure is
kept too, more briefly. Nothing older than that is used to decide. What the snapshot means for this request is
worked out anew each time: conditions, then the table of outcomes, then the context for the audit event.

The mode is the settings' own, or what the server said with the snapshot; else what it said last, if that is not long
ago; else `strict`.
"""

from __future__ import annotations

import re
import time
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from datetime import UTC, datetime

from tasks.governance.metaqore.background import Background
from tasks.governance.metaqore.breaker import Breaker
from tasks.governance.metaqore.cache import Cache
from tasks.governance.metaqore.client import Client
from tasks.governance.metaqore.context import ModeSource, Named, conditions, context
from tasks.governance.metaqore.outcomes import Condition, Mode, rule
from tasks.governance.metaqore.snapshot import Snapshot
from tasks.governance.psmp import Standing
from tasks.settings import MetaqoreGroup

#: MetaQore makes no other ids. Whatever else a caller names is unknown without asking, and gets into no URL.
PROJECT_ID = re.compile(r"proj_[0-9a-f]{12}", re.ASCII)
#: In place of a project's id, to ask for the mode and nothing else.
_MODE_ALONE = ""
ASSUMED_MODE: Mode = "strict"
#: Answers that say nothing against the server's health.
_HEALTHY = (None, "project_unknown")


class LiveProjects:
    """Asks the MetaQore server of `settings.url`. `api_key` is sent to it if there is one."""

    def __init__(self, settings: MetaqoreGroup, api_key: str | None) -> None:
        self._settings = settings
        self._client = Client(settings, api_key)
        self._breaker = Breaker(settings.breaker_failures, settings.breaker_open_s, time.monotonic)
        self._background = Background("metaqore", self._client.close)
        self._cache = Cache(self._start, self._keep_s, settings.cache_projects)
        #: The mode that the server named last, and when by the monotonic clock.
        self._last_mode: tuple[Mode, float] | None = None

    def standing(
        self, *, project_id: str | None, artifact_id: str | None, task_id: str | None, agent_name: str
    ) -> Standing | None:
        """Return how the project stands, or None if none is named. Never raises; blocks up to the timeout."""
        if project_id is None:
            return None
        if PROJECT_ID.fullmatch(project_id):
            snapshot = self._snapshot(project_id)
        else:
            # Whatever became of the question for the mode, this is known.
            snapshot = replace(self._snapshot(_MODE_ALONE), failure="project_unknown")
        named = Named(project_id, artifact_id, task_id, agent_name)
        mode, source = self._mode(snapshot)
        ruling = rule(conditions(snapshot, named, source), mode, project_id=project_id, artifact_id=artifact_id)
        shown = {"outcome": ruling.outcome, "conditions": list(ruling.conditions)}
        shown |= context(snapshot, named, mode, source, datetime.now(UTC))
        return Standing(shown, ruling.veto, ruling.retryable)

    def close(self) -> None:
        """Let go of connections and the thread."""
        self._background.close()

    def _snapshot(self, project_id: str) -> Snapshot:
        try:
            return self._cache.ask(project_id).result(self._settings.timeout_s)
        except TimeoutError:
            return _failed("timeout")
        except CancelledError:
            return _failed("unreachable")

    def _start(self, project_id: str) -> Future[Snapshot]:
        future = self._background.submit(self._fetch(project_id))
        if future is None:
            future = Future()
            future.set_result(_failed("unreachable"))
        return future

    async def _fetch(self, project_id: str) -> Snapshot:
        ticket = self._breaker.admit()
        if ticket is None:
            return _failed("breaker_open")
        failure: str | None = "interrupted"
        try:
            snapshot = await self._client.snapshot(project_id or None)
            failure = None if snapshot.failure in _HEALTHY else snapshot.failure
        finally:
            self._breaker.record(ticket, failure)
        if snapshot.mode is not None:
            self._last_mode = (snapshot.mode, time.monotonic())
        return snapshot

    def _keep_s(self, snapshot: Snapshot) -> float:
        """Return how long an answer is used: an unknown project may be made in the next moment."""
        return self._settings.cache_s if snapshot.failure is None else self._settings.failure_cache_s

    def _mode(self, snapshot: Snapshot) -> tuple[Mode, ModeSource]:
        """Return the mode in force, and how it is known."""
        if self._settings.mode is not None:
            return self._settings.mode, "setting"
        if snapshot.mode is not None:
            return snapshot.mode, "metaqore"
        last = self._last_mode
        if last is not None and time.monotonic() - last[1] <= self._settings.remember_mode_s:
            return last[0], "remembered"
        return ASSUMED_MODE, "assumed"


def _failed(condition: Condition) -> Snapshot:
    return Snapshot(datetime.now(UTC), condition)
