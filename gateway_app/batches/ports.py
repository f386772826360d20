"""What driving batches needs of the rest of the gateway, and how much of it may be used at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from sqlalchemy.engine import Row

from gateway_app.batches.files import Files
from gateway_app.governance.api_keys import Caller
from tasks.crypto import KeyWrapper
from tasks.db import Database

#: Threads that submit lines: requests that are admitted together share a commit.
SUBMITTERS = 8


class Submit(Protocol):
    """Takes one line in as an ordinary request of low priority."""

    def __call__(
        self, caller: Caller, url: str, body: Mapping[str, Any], *, request_id: str, deadline: datetime
    ) -> object:
        """Admit the request under `request_id` and queue it.

        Raises ServiceUnavailable or QueueFull if the line should be tried again later, under another id if a refusal is
        recorded under this one; any other GatewayError once the refusal is recorded; IntegrityError if there is a
        request or a refusal of this id already.
        """
        ...


#: Returns the response body, in its endpoint's form, of a request that completed.
Render = Callable[[Row[Any]], Mapping[str, Any]]


class Cancel(Protocol):
    """Has a request end early."""

    def __call__(self, request_id: str, organization: str, /) -> object:
        """Cancel without waiting for it. Raises ServiceUnavailable to be called again; other errors mean it is over."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a batch may be and how it is run. Sizes in bytes, times in seconds.

    `window` is the number of requests one batch has under way at once, `group` how many are submitted in one go.
    """

    max_lines: int = 50_000
    max_line_bytes: int = 4 * 2**20
    window: int = 100
    group: int = 16
    poll_s: float = 0.25
    claim_s: float = 30.0
    #: How long a request that was told to stop is waited for before its line is reported without it.
    grace_s: float = 600.0


class Backoff:
    """Keeps submitting away from a queue that is full or away: 1 s, then twice as long each time, up to 30 s.

    Shared by all batches of a process and by the threads that submit.
    """

    def __init__(self, first_s: float = 1.0, last_s: float = 30.0) -> None:
        self._first_s, self._last_s = first_s, last_s
        self._delay_s = 0.0
        self._until = 0.0

    @property
    def waiting(self) -> bool:
        """Tell whether it is too early to try again."""
        return time.monotonic() < self._until

    @property
    def recovering(self) -> bool:
        """Tell whether the last try failed, so that the next should be a single one."""
        return self._delay_s > 0

    def failed(self) -> None:
        """Wait before the next try, longer than the last time."""
        if not self.waiting:
            self._delay_s = min(self._last_s, max(self._first_s, self._delay_s * 2))
            self._until = time.monotonic() + self._delay_s

    def succeeded(self) -> None:
        """Begin from the start at the next failure."""
        self._delay_s = 0.0


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that driving a batch uses."""

    database: Database
    files: Files
    keys: KeyWrapper
    submit: Submit
    render: Render
    cancel: Cancel
    limits: Limits = Limits()
    backoff: Backoff = field(default_factory=Backoff)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(SUBMITTERS, "batch-submit"))
