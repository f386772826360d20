"""Responses as they are stored. A response is an ordinary request and nothing beside it, so any process can do this."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import Row

from gateway_app.openai.response_events import BEFORE, Event, Events
from gateway_app.openai.response_input import answered, input_items
from gateway_app.openai.responses import completed, outset, response
from gateway_app.streaming.watch import Watcher
from tasks.errors import AnswerChanged, NotCompleted, NotFound
from tasks.job import TaskRequest
from tasks.stream import Frame


@dataclass(frozen=True, slots=True)
class Responses:
    """Reads responses, for the organization they belong to."""

    watcher: Watcher

    def find(self, response_id: str, organization: str, param: str | None = None) -> Row[Any]:
        """Return the response's row. Raises NotFound, for requests that came through another API too."""
        try:
            row = self.watcher.find(response_id, organization)
        except NotFound:
            row = None
        if row is None or row.api != "responses":
            raise NotFound("there is no such response", **({"param": param} if param else {}))
        return row

    def show(self, row: Row[Any]) -> dict[str, Any]:
        """Return the response object as it is now."""
        return response(row, self.watcher.request(row), self.watcher.result(row))

    def input(self, row: Row[Any]) -> list[dict[str, Any]]:
        """Return the items that the response answers, earlier ones of the conversation included, in order."""
        return input_items(row.request_id, _conversation(self.watcher.request(row)))

    def continued(self, response_id: str, organization: str) -> list[dict[str, Any]]:
        """Return the conversation that the response ended. Raises NotFound or NotCompleted."""
        row = self.find(response_id, organization, "previous_response_id")
        result = self.watcher.result(row)
        if row.state != "completed" or result is None:
            raise NotCompleted(f"the earlier response is {row.state}", param="previous_response_id")
        return answered(_conversation(self.watcher.request(row)), result)

    def events(self, row: Row[Any]) -> Events:
        """Return the response's events, to be made from its frames."""
        task = self.watcher.request(row)
        return Events(
            row.request_id,
            background=task.asked.get("background", False),
            outset=lambda status: outset(row, task, status),
            completed=lambda result: completed(row, task, result),
            ended=lambda: self.show(self.watcher.find(row.request_id, row.organization)),
        )

    def finished_events(self, row: Row[Any], after: int, frames: list[Frame | None]) -> list[Event | None]:
        """Return the events after number `after` of a response whose frames are all there. Raises as `Events.after`.

        If its answer was begun again and came out differently, whoever reads from the start is shown the one that holds.
        """
        try:
            return list(self.events(row).after(after, frames))
        except AnswerChanged:
            if after != BEFORE:
                raise
            begins = [place for place, frame in enumerate(frames) if frame is not None and frame.event == "reset"]
            return list(self.events(row).after(after, frames[begins[-1] :]))


def _conversation(task: TaskRequest) -> Iterable[dict[str, Any]]:
    """Return a request's messages but for its instructions, which come first and are for it alone."""
    return task.messages[1:] if "instructions" in task.asked else task.messages
