"""The thread that drives batches: one a gateway process, for all batches that the process has claimed.

A batch's life is a generator that does a bounded piece of work and says how long to leave it alone, so that many
batches take turns in one thread. Everything it knows is in SQL: when the database or the queue is away the generator is
dropped, and a new one begins where the record stands. The same happens in another process once this one's claims expire.

The thread starts with the first request of any kind, so that a server that forks its workers has not forked it, and
looks every few seconds for batches that lost their driver. Now and then it sweeps files that are deleted or expired.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from gateway_app.batches.claims import Claim, ClaimLost, take
from gateway_app.batches.execution import Execution
from gateway_app.batches.lines import Problem
from gateway_app.batches.output import Output
from gateway_app.batches.ports import Services
from gateway_app.batches.validation import clear, validate
from tasks.db import now
from tasks.errors import ServiceUnavailable
from tasks.logs import get_logger

logger = get_logger(__name__)
#: Batches one process drives at once; others wait for a turn or another process.
MAX_BATCHES = 16
#: How often batches without a driver are looked for, in seconds.
SCOUT_S = 5.0
SWEEP_S = 60.0
#: Pause after the database was found away, in seconds: doubled each time, up to the second.
RETRY_S = 2.0
MAX_RETRY_S = 20.0
#: Unexpected errors after which a batch is failed, so that it does not fail for ever.
MAX_CRASHES = 5


def drive(services: Services, claim: Claim) -> Iterator[float]:
    """Take a batch from where it stands to its end. Yields seconds to pause. Raises ClaimLost, ServiceUnavailable."""
    row = claim.look()
    if row.status == "validating":
        if not (yield from validate(services, claim, row)):
            return
        row = claim.look()
    if row.status == "cancelling" and row.in_progress_at is None:
        # Cancelled before any line ran: whatever of it is stored already is not to be reported line by line.
        clear(claim)
    elif row.status != "finalizing":
        yield from Execution(services, claim, row).rounds()
        claim.write(lambda connection: claim.move(connection, "in_progress", "finalizing", {"finalizing_at": now()}))
    yield from Output(services, claim, claim.look()).pages()


class Driver:
    """Drives batches in a thread of its own. `start` is cheap, and meant to be called with every request."""

    def __init__(self, services: Services, *, max_batches: int = MAX_BATCHES, scout_s: float = SCOUT_S) -> None:
        self._services = services
        self._max_batches = max_batches
        self._scout_s = scout_s
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._runs: list[_Run] = []
        self._next_scout = self._next_sweep = 0.0

    def start(self) -> None:
        """Start the thread, unless it runs already."""
        if self._thread is None and not self._closing.is_set():
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work_forever, name="batch-driver", daemon=True)
                    self._thread.start()

    def wake(self) -> None:
        """Look for a new batch at once."""
        self._next_scout = 0.0
        self.start()
        self._wake.set()

    def close(self) -> None:
        """End the thread after the piece of work it is at, and leave its batches to others."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        for run in self._runs:
            try:
                run.claim.release()
            except ServiceUnavailable:
                # The claims expire by themselves.
                break
        self._services.pool.shutdown()

    def _work_forever(self) -> None:
        trouble, retry_s = "", RETRY_S
        while not self._closing.is_set():
            try:
                pause = self._round()
                trouble, retry_s = "", RETRY_S
            except Exception as error:  # whatever it is, other batches and later rounds must not suffer from it
                pause, retry_s = retry_s, min(retry_s * 2, MAX_RETRY_S)
                if type(error).__name__ != trouble:
                    trouble = type(error).__name__
                    logger.warning("the batch driver waits", why=trouble)
            self._wake.wait(pause)
            self._wake.clear()

    def _round(self) -> float:
        """Advance every batch that is due. Returns how long nothing will be."""
        if time.monotonic() >= self._next_scout:
            self._scout()
        for run in list(self._runs):
            if self._closing.is_set():
                return 0
            if run.due <= time.monotonic() and not run.advance(self._services):
                self._runs.remove(run)
                self._next_scout = 0.0
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_S
            self._services.files.sweep()
        next_due = min((run.due for run in self._runs), default=self._next_scout)
        return max(0.0, min(next_due, self._next_scout) - time.monotonic())

    def _scout(self) -> None:
        self._next_scout = time.monotonic() + self._scout_s
        while len(self._runs) < self._max_batches:
            claim = take(self._services.database, self._owner, self._services.limits.claim_s)
            if claim is None:
                return
            self._runs.append(_Run(claim, drive(self._services, claim)))


class _Run:
    """One claimed batch and how far it is."""

    def __init__(self, claim: Claim, steps: Iterator[float]) -> None:
        self.claim = claim
        self.due = 0.0
        self._steps = steps
        self._crashes = 0

    def advance(self, services: Services) -> bool:
        """Do the next piece of work. Returns False if the batch is through, or somebody else's."""
        pause = RETRY_S
        try:
            pause = next(self._steps)
        except StopIteration:
            return False
        except ClaimLost:
            return False
        except ServiceUnavailable:
            self._steps = drive(services, self.claim)
        except Exception as error:  # a batch that cannot be driven must not end the thread that drives the others
            logger.error("unexpected error in a batch", batch_id=self.claim.batch_id, error=type(error).__name__)
            self._crashes += 1
            if self._crashes >= MAX_CRASHES:
                self._steps = _give_up(self.claim)
            else:
                self._steps = drive(services, self.claim)
        self.due = time.monotonic() + pause
        return True


def _give_up(claim: Claim) -> Iterator[float]:
    problem = Problem("internal_error", "The batch could not be run; the gateway's log says why.")
    claim.fail([problem.as_dict()])
    yield from ()
