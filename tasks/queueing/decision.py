"""Why a request was given to the worker that ran it: what the queue's script looked at, and what it chose.

The script writes it (`reserve.lua`), the message brings it to the worker, and the `started` event keeps it as `schedule`. On
its way it lies in Redis, where others might write, so it is read strictly: only what is known, of the right kind, and no more
than the script writes. What cannot be read is left out; the request runs all the same.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from tasks.job import Name
from tasks.queueing.pull import Strategy

#: The script writes some 300 bytes for each candidate.
MAX_BYTES: Final = 8192
MAX_CANDIDATES: Final = 8
#: No prompt is as long.
MOST_TOKENS: Final = 10**12
_List = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}(:high|:low)?$")]
_Count = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
_Number = Annotated[float, Field(ge=-1e12, le=1e12)]


class _Known(BaseModel):
    """Takes what it knows, and passes over the rest: the script may be of a later release."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Candidate(_Known):
    """A list that was looked at. Tokens are of its profile's static part, times in seconds, instants in Redis's time.

    `cached` of the `static` tokens were held by the worker, `gpu` of them where they need not be loaded; to compute and load
    the others takes `seconds`. `waiting` requests had `waited` so long, all together, for what `copies` other workers hold,
    of which the one with the fewest tokens in hand has `lightest`, and each runs `fewest` requests with it or more; until `filling`
    the worker itself computes it. The strategy made `price` of that, and `eligible_at`: not before then.
    """

    profile: _List
    turn: _Number
    waiting: _Count = 1
    waited: _Number = 0.0
    cached: _Count = 0
    gpu: _Count = 0
    static: _Count = 0
    seconds: _Number = 0.0
    copies: _Count = 0
    lightest: _Count | None = None
    fewest: _Count | None = None
    filling: _Number | None = None
    price: _Number | None = None
    eligible_at: _Number = 0.0

    @property
    def static_profile_hash(self) -> str:
        """Return the hash of the profile."""
        return self.profile.partition(":")[0]


class WorkerFacts(_Known):
    """What the worker wished, see `pull.Wish`, and where it stood among the others with room.

    Whether it was its turn is recorded where turns count; elsewhere a replay takes it to be so.
    """

    seats: _Count = 0
    room: _Count
    budget: _Count
    in_flight: _Count = 0
    load: _Count = 0
    free_tokens: _Count = 0
    prefill_rate: _Number
    ram_rate: _Number = 0.0
    disk_rate: _Number = 0.0
    affinity: _Number
    patience: _Number
    is_least_loaded: bool = False
    is_next: bool = True


class Decision(_Known):
    """One batch: `batch` requests of candidate number `chosen` went to `worker`. The candidates are of one organization."""

    strategy: Strategy
    worker: Name
    organization: Name | None = None
    at: _Number
    batch: _Count
    chosen: _Count = 0
    candidates: tuple[Candidate, ...] = Field(min_length=1, max_length=MAX_CANDIDATES)
    worker_facts: WorkerFacts

    @model_validator(mode="after")
    def _chooses_a_candidate(self) -> Decision:
        if self.chosen >= len(self.candidates):
            raise ValueError("there is no such candidate")
        return self

    @property
    def winner(self) -> Candidate:
        """Return what was chosen."""
        return self.candidates[self.chosen]

    @property
    def predicted_tokens(self) -> int:
        """Return how many tokens of the static part should be found in the worker's KV cache."""
        return min(self.winner.cached, self.winner.static)

    def is_for(self, static_profile_hash: str, worker: str) -> bool:
        """Tell whether it gave a request with this profile, and so of its organization, to this worker."""
        return self.winner.static_profile_hash == static_profile_hash and self.worker == worker

    def document(self) -> dict[str, Any]:
        """Return all of it."""
        return self.model_dump(mode="json", exclude_none=True)

    def record(self) -> dict[str, Any]:
        """Return it as the event keeps it: what is 0 or usual is left out, which is half of it."""
        return self.model_dump(mode="json", exclude_defaults=True)


@functools.lru_cache(maxsize=2)
def read(text: bytes | str) -> Decision | None:
    """Return the decision that a message came with, or None if there is none that can be believed.

    All messages of a batch come with the same.
    """
    if not text or len(text) > MAX_BYTES:
        return None
    try:
        return Decision.model_validate_json(text)
    except ValidationError:
        return None


def recorded(details: Any) -> Decision | None:
    """Return the decision in a `started` event's details, or None: earlier releases recorded none."""
    schedule = details.get("schedule") if isinstance(details, dict) else None
    try:
        return None if schedule is None else Decision.model_validate(schedule)
    except ValidationError:
        return None
