"""What a request must be, whatever is done to it: a few lines that are obviously right."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tasks.lifecycle import FIRST_EPOCH, Attempt
from tasks.schema import TERMINAL_STATES
from tests.tasks.lifecycle.admitted import MAX_EPOCHS

MAX_ATTEMPTS = 3


@dataclass
class Model:
    """A request in memory. Its functions return what those of the same name in `tasks.lifecycle` must."""

    deadline: datetime | None = None
    state: str = "queued"
    epoch: int = FIRST_EPOCH
    attempt: int = 0
    excused: int = 0
    code: str | None = None
    result: bytes | None = None
    kind: str | None = None
    ended_by: tuple[int, int] | None = None
    not_before: datetime | None = None
    cancel_requested: bool = False
    starts: list[tuple[int, int, str]] = field(default_factory=list)
    #: Epoch, attempt and code of each event that says `requeued`.
    requeued: list[tuple[int, int, str]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Tell whether nothing may change any more."""
        return self.state in TERMINAL_STATES

    def end(self, state: str, code: str | None, result: bytes | None = None, kind: str | None = None) -> None:
        """Be ended."""
        self.state, self.code, self.result, self.kind = state, code, result, kind or state
        self.ended_by, self.not_before = (self.epoch, self.attempt), None

    def end_if_unwanted(self, at: datetime) -> bool:
        """Be ended if somebody cancelled it, or it is too late."""
        if self.cancel_requested:
            self.end("cancelled", "cancelled")
        elif self.deadline is not None and self.deadline <= at:
            self.end("expired", "expired")
        return self.ended

    def start(self, epoch: int, worker: str, refused: tuple[str, str] | None, at: datetime) -> bool:
        """Begin an attempt, or be ended instead; tell which."""
        if self.ended or epoch != self.epoch or self.end_if_unwanted(at):
            return False
        if self.attempt - self.excused >= MAX_ATTEMPTS:
            self.end("dead", "attempts_exhausted")
        elif refused is not None:
            self.end("failed", refused[1], kind=refused[0])
        else:
            self.state, self.attempt, self.not_before = "running", self.attempt + 1, None
            self.starts.append((self.epoch, self.attempt, worker))
        return not self.ended

    def is_of(self, attempt: Attempt) -> bool:
        """Tell whether the attempt is the newest one."""
        return (attempt.epoch, attempt.number) == (self.epoch, self.attempt)

    def finish(self, attempt: Attempt, state: str, code: str | None, result: bytes | None) -> bool:
        """Be ended by an attempt, if it runs."""
        if not self.is_of(attempt) or self.state == "queued":
            return False
        if self.ended:
            return (self.state, self.code) == (state, code)
        self.end(state, code, result)
        return True

    def give_back(self, attempt: Attempt, code: str, delay: timedelta, *, excused: bool, at: datetime) -> str:
        """Be queued again after an attempt, or ended."""
        if not self.is_of(attempt):
            said = {(epoch, number) for epoch, number, _ in self.requeued}
            return "queued" if (attempt.epoch, attempt.number) in said else "fenced"
        if self.state == "queued":
            return "queued"
        if self.ended:
            return self.state if self.state in ("dead", "cancelled", "expired") else "fenced"
        if self.end_if_unwanted(at):
            return self.state
        if not excused and self.attempt - self.excused >= MAX_ATTEMPTS:
            self.end("dead", "attempts_exhausted")
            return "dead"
        self.state, self.not_before = "queued", at + delay
        self.excused += excused
        self.requeued.append((self.epoch, self.attempt, code))
        return "queued"

    def republish(self, epoch: int, attempt: int, at: datetime) -> bool:
        """Be queued under the next epoch; tell whether it was."""
        if self.ended or (epoch, attempt) != (self.epoch, self.attempt) or self.end_if_unwanted(at):
            return False
        if self.epoch >= MAX_EPOCHS:
            self.end("dead", "queue_lost")
            return False
        self.excused += self.state == "running"
        self.state, self.epoch, self.not_before = "queued", self.epoch + 1, None
        self.requeued.append((self.epoch, self.attempt, "queue_lost"))
        return True

    def cancel(self) -> None:
        """Be cancelled, now or by the worker."""
        if self.state == "queued":
            self.end("cancelled", "cancelled")
        elif not self.ended:
            self.cancel_requested = True

    def expire(self, at: datetime) -> bool:
        """Be ended if it waits and is too late; tell whether it was."""
        if self.state != "queued" or self.deadline is None or self.deadline > at:
            return False
        self.end("expired", "expired")
        return True
