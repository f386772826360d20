"""A request's life in SQL: the only code that changes the state of a request. `tasks/states.py` lists all its steps.

    admission     a request comes in, or is refused
    attempts      a worker begins it, and answers it
    giving_back   an attempt ends without an answer, for another try or as the last one
    publication   the housekeeper publishes again what Redis lost, and ends what nobody took in time
    ending        every way to a terminal state, cancelling included

Every step and its audit event are one transaction. An attempt is fenced: it may only change the request while the row
is running and still carries its epoch and attempt, so a worker that was given up for lost cannot overwrite the attempt
that replaced it. Every decision is taken of a row that is locked, or by the condition of the UPDATE itself, so that two
processes never decide of the same moment. Functions take a connection inside a transaction and may be run again, both
where the transaction failed and where only the answer to its commit was lost; `start` then begins one more attempt.
"""

from tasks.lifecycle.admission import FIRST_EPOCH, Admission, admit, refuse
from tasks.lifecycle.attempts import WORKER_LOST, NotStarted, Refusal, answer, start
from tasks.lifecycle.ending import cancel, expire, finish
from tasks.lifecycle.giving_back import GivenBack, give_back
from tasks.lifecycle.publication import Republished, expire_overdue, republish
from tasks.lifecycle.rows import Attempt

__all__ = [
    "FIRST_EPOCH",
    "WORKER_LOST",
    "Admission",
    "Attempt",
    "GivenBack",
    "NotStarted",
    "Refusal",
    "Republished",
    "admit",
    "answer",
    "cancel",
    "expire",
    "expire_overdue",
    "finish",
    "give_back",
    "refuse",
    "republish",
    "start",
]
