"""The endpoints that a batch's lines may name: how a line becomes a request, and a finished request a response body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Row

from gateway_app import tracing
from gateway_app.api.chat import head
from gateway_app.api.reading import validate
from gateway_app.governance.api_keys import Caller
from gateway_app.openai import completions
from gateway_app.openai.chat_body import ChatBody
from gateway_app.openai.response_body import ResponseBody
from gateway_app.pipeline import Accepted, Pipeline
from gateway_app.responses import Responses
from gateway_app.streaming.watch import Watcher
from tasks.errors import GatewayError, NotFound, Unsupported
from tasks.job import TaskRequest
from tasks.logs import bind_request

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Submits and renders. `tool_parser` is the model's, if it has one."""

    pipeline: Pipeline
    watcher: Watcher
    tool_parser: str | None

    def submit(
        self, caller: Caller, url: str, body: Mapping[str, Any], *, request_id: str, deadline: datetime
    ) -> Accepted:
        """Take a line in as an ordinary request of low priority, which ends with its batch; see ports.Submit."""

        def read() -> TaskRequest:
            if body.get("stream") or body.get("background"):
                raise Unsupported("a batch's requests are neither streamed nor in the background", param="stream")
            request = self._read(caller, url, body)
            return request.model_copy(update={"priority": "low", "deadline": deadline})

        with tracing.apart("line of a batch"):
            try:
                return self.pipeline.submit(caller, read, request_id=request_id)
            finally:
                # The thread goes on with another line.
                bind_request(None)

    def render(self, row: Row[Any]) -> dict[str, Any]:
        """Return the body of the response to a completed request. Raises NotFound if its answer is gone."""
        if row.api == "responses":
            return Responses(self.watcher).show(row)
        result = self.watcher.result(row)
        if result is None:
            raise NotFound("the answer is no longer stored")
        return completions.completion(head(row, self.watcher.request(row).agent or self.pipeline.model_name), result)

    def _read(self, caller: Caller, url: str, body: Mapping[str, Any]) -> TaskRequest:
        model_name = self.pipeline.model_name
        if url == CHAT:
            return validate(ChatBody, body).request((), model_name, self.tool_parser)
        if url == RESPONSES:
            responses = Responses(self.watcher)
            return ResponseBody.read(body).request(
                (), model_name, self.tool_parser, lambda earlier: responses.continued(earlier, caller.organization)
            )
        raise GatewayError(f"no endpoint is {url}")
