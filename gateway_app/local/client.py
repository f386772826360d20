"""A small client of the gateway's HTTP interface: submit a task, watch it, ask for readiness."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit


class RequestFailed(Exception):
    """The gateway refused the request; the message is its own."""


@dataclass(frozen=True, slots=True)
class Event:
    """One frame of a task's stream."""

    id: str
    name: str
    data: dict[str, Any]


class Client:
    """Talks to the gateway at `url` with an API key. `timeout_s` bounds each wait for bytes."""

    def __init__(self, url: str, key: str = "", timeout_s: float = 60.0) -> None:
        self._netloc = urlsplit(url).netloc
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout_s = timeout_s

    def missing(self) -> list[str]:
        """Return the parts that are missing for work to be done; "web" alone while nothing answers."""
        try:
            answer = self._json("GET", "/readyz")
        except (OSError, HTTPException, ValueError):
            return ["web"]
        return list(answer.get("missing", ())) or ([] if answer.get("status") == "ready" else ["web"])

    def submit(self, task: dict[str, Any]) -> dict[str, Any]:
        """Return what `POST /v1/tasks` answers. Raises RequestFailed if it refuses."""
        return self._json("POST", "/v1/tasks", task, expected=202)

    def events(self, path: str) -> Iterator[Event]:
        """Give a task's frames as they come, to the last one."""
        connection = self._connect()
        try:
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            if response.status != 200:  # noqa: PLR2004  as HTTP names it
                raise RequestFailed(_problem(response.read()))
            fields: dict[str, str] = {}
            for raw in response:
                line = raw.decode().rstrip("\n")
                if line and not line.startswith(":"):
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
                elif not line and "event" in fields:
                    yield Event(fields["id"], fields["event"], json.loads(fields["data"]))
                    fields = {}
        finally:
            connection.close()

    def _json(self, method: str, path: str, body: Any = None, expected: int | None = None) -> dict[str, Any]:
        connection = self._connect()
        try:
            headers = {**self._headers, "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if expected is not None and response.status != expected:
            raise RequestFailed(_problem(content))
        answer: dict[str, Any] = json.loads(content)
        return answer

    def _connect(self) -> HTTPConnection:
        return HTTPConnection(self._netloc, timeout=self._timeout_s)


def _problem(content: bytes) -> str:
    try:
        problem = json.loads(content)
        return f"{problem.get('code', problem.get('status'))}: {problem.get('detail', problem.get('title'))}"
    except ValueError:
        return content[:200].decode("utf-8", errors="replace")
