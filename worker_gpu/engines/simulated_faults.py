"""Faults of an engine, made on purpose: what load tests and drills need to see how everything around it takes them.

A fault strikes when the request it is meant for gets its first token, in the middle of the answers of others. Which
request that is, is told by its number, counted from 1 in the life of one engine, or by its sampling seed: then it
strikes each time that request comes again, on any worker, as a poison request does.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tasks.logs import get_logger
from worker_gpu.engines.base import GenerationRequest

logger = get_logger(__name__)


class Fault(BaseModel):
    """What goes wrong, and at which request. `request` or `seed` must be given, and only one of them.

    `fail` ends this request alone. `die` and `out_of_memory` end the engine with all that it runs. `hang` lets it live
    without another step. `kill` ends the whole process as the kernel would, without a word.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: Literal["fail", "die", "out_of_memory", "hang", "kill"]
    request: int | None = Field(default=None, ge=1, description="The so-many-th request of this engine.")
    seed: int | None = Field(default=None, ge=0, description="Every request with this sampling seed.")

    @model_validator(mode="after")
    def _names_one(self) -> Fault:
        if (self.request is None) == (self.seed is None):
            raise ValueError("either request or seed")
        return self


class Broken(Exception):
    """The engine breaks here, as a fault asks for."""


class Faults:
    """Knows which requests a fault is meant for, and lets it strike."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self._faults = tuple(faults)
        self._arrived = 0
        self._meant: dict[str, Fault] = {}

    def arrive(self, request: GenerationRequest) -> None:
        """Count a request, and note the fault that is meant for it."""
        self._arrived += 1
        for fault in self._faults:
            if fault.request == self._arrived or (fault.seed is not None and fault.seed == request.sampling.seed):
                self._meant[request.request_id] = fault

    def leave(self, request_id: str) -> None:
        """Forget a request that the engine does not run any more."""
        self._meant.pop(request_id, None)

    def strike(self, request_id: str) -> Literal["fail", "hang"] | None:
        """Let the fault of a request strike; return what only the engine can do.

        Raises Broken or MemoryError where the engine dies. Does not return where the process does.
        """
        fault = self._meant.pop(request_id, None) if self._meant else None
        if fault is None:
            return None
        logger.warning("a simulated fault", tag=request_id, outcome=fault.what)
        if fault.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.what == "out_of_memory":
            raise MemoryError
        if fault.what in ("fail", "hang"):
            return fault.what
        raise Broken
