"""A small MetaQore: it answers over HTTP as MetaQore's server does, and fails in any way it is told to.

It runs in the test's own process, a thread a connection. `projects` hold what it knows, in MetaQore's own form; `how` says
how a kind of question (see KINDS) is answered, and `calls` has the paths that were asked.
"""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.metaqore_failures import misbehave, send

#: Of `governance` there are two kinds of questions: the blocking report has that name, and `conflicts` are the list.
KINDS = ("health", "projects", "governance", "conflicts")
LONGEST_PAGE = 200
DESCRIPTION = "free text that has no place in an audit event"


def project_id(number: int) -> str:
    """Return a well-formed id."""
    return f"proj_{number:012x}"


def artifact(number: int, project: str, *, conflicts: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """Return an artifact in MetaQore's form; it is blocked by conflicts that are unresolved."""
    return {
        "id": f"art_{number:012x}",
        "project_id": project,
        "artifact_type": "design",
        "version": 1,
        "data": {"text": DESCRIPTION},
        "created_by": "architect",
        "depends_on": [],
        "blocked_by": list(conflicts),
        "is_blocked": any(not conflict["resolved"] for conflict in conflicts),
    }


def conflict(number: int, severity: str, *, resolved: bool = False, kind: str = "version_mismatch") -> dict[str, Any]:
    """Return a conflict in MetaQore's form."""
    return {
        "id": f"conf_{number:012x}",
        "artifact_id": f"art_{number:012x}",
        "project_id": None,
        "description": DESCRIPTION,
        "severity": severity,
        "conflict_type": kind,
        "resolved": resolved,
    }


class StandIn:
    """The server. `api_key` is asked for if it is set."""

    def __init__(self) -> None:
        self.mode = "strict"
        self.api_key: str | None = None
        self.projects: dict[str, dict[str, Any]] = {}
        #: A project's conflicts beside those that block its artifacts.
        self.conflicts: dict[str, list[dict[str, Any]]] = {}
        #: Whether parts of lists are given as they are asked for, or the whole each time.
        self.pages = True
        #: How many more conflicts it counts than it ever sends.
        self.kept_back = 0
        self.how: dict[str, str] = {}
        self.slow_s = 0.0
        self.calls: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.lock = Lock()
        self.closing = Event()
        self._server = _Server(("127.0.0.1", 0), self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def add(self, number: int, status: str = "in_progress", *artifacts: dict[str, Any]) -> str:
        """Make a project, in place of one of this number, and return its id."""
        name = project_id(number)
        task = {"id": f"task_{number:012x}", "project_id": name, "title": DESCRIPTION, "status": "pending"}
        self.projects[name] = {
            "id": name,
            "name": DESCRIPTION,
            "status": status,
            "artifacts": list(artifacts),
            "tasks": [task],
        }
        return name

    def fail(self, how: str | None, *kinds: str) -> None:
        """Answer questions of these kinds, or all, in this way from now on; None: as one should."""
        for kind in kinds or KINDS:
            self.how.pop(kind, None)
            if how is not None:
                self.how[kind] = how

    def close(self) -> None:
        """Stop, and let go of whoever hangs."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], stand_in: StandIn) -> None:
        self.stand_in = stand_in
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that give up are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer is two writes, and the second must not wait for the first to be acknowledged.
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        with self.server.stand_in.lock:
            self.server.stand_in.connections += 1
        super().setup()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  as its base calls it
        """Say nothing."""

    def do_GET(self) -> None:
        stand_in, url = self.server.stand_in, urlsplit(self.path)
        kind = url.path.removeprefix("/api/v1/").partition("/")[0]
        if url.path == "/api/v1/governance/conflicts":
            kind = "conflicts"
        with stand_in.lock:
            stand_in.calls.append(self.path)
            stand_in.headers.append(dict(self.headers))
        if stand_in.slow_s:
            stand_in.closing.wait(stand_in.slow_s)
        status, content = self.answer(
            kind, url.path, {name: values[-1] for name, values in parse_qs(url.query).items()}
        )
        how = stand_in.how.get(kind)
        with suppress(OSError):
            if how is None:
                send(self, status, json.dumps(content).encode())
            else:
                misbehave(self, how, content, stand_in.closing)

    def answer(self, kind: str, path: str, query: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """Return what MetaQore would."""
        stand_in = self.server.stand_in
        if stand_in.api_key is not None and self.key() != stand_in.api_key:
            return 401, {"detail": "Invalid token" if self.key() else "Authorization required"}
        if path == "/api/v1/health":
            return enveloped(
                {"service": "metaqore", "status": "ok", "governance_mode": stand_in.mode, "version": "1.0"}
            )
        wanted = unquote(path.rpartition("/")[2]) if kind == "projects" else query.get("project_id", "")
        governance = ("/api/v1/governance/blocking-report", "/api/v1/governance/conflicts")
        if path not in (f"/api/v1/projects/{wanted}", *governance):
            return 404, {"detail": "Not Found"}
        project = stand_in.projects.get(wanted)
        if project is None:
            return 404, {"detail": "Project not found"}
        if kind == "conflicts":
            return self.page(project, query)
        return enveloped(project if kind == "projects" else report(project))

    def page(self, project: dict[str, Any], query: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """Return a page of the project's conflicts, those in the way of its artifacts among them."""
        stand_in = self.server.stand_in
        number, size = int(query.get("page", "1")), int(query.get("page_size", "25"))
        if number < 1 or not 1 <= size <= LONGEST_PAGE:
            return 422, {"detail": [{"loc": ["query"], "msg": "out of range"}]}
        found = [one for item in project["artifacts"] for one in item["blocked_by"]]
        found += stand_in.conflicts.get(project["id"], [])
        if stand_in.pages and "resolved" in query:
            found = [one for one in found if one["resolved"] == (query["resolved"] == "true")]
        shown = found[(number - 1) * size : number * size] if stand_in.pages else found
        conflicts = [{**one, "project_id": project["id"]} for one in shown]
        return enveloped(
            {"conflicts": conflicts, "total": len(found) + stand_in.kept_back, "page": number, "page_size": size}
        )

    def key(self) -> str | None:
        """Return the key that was sent, in either of the two ways."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if scheme.lower() == "bearer" else self.headers.get("X-API-Key")


def enveloped(data: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return a successful answer in MetaQore's envelope."""
    metadata = {"request_id": "req", "timestamp": datetime.now(UTC).isoformat(), "latency_ms": 0.1}
    return 200, {"status": "success", "data": data, "metadata": metadata}


def report(project: dict[str, Any]) -> dict[str, Any]:
    """Return a project's blocking report."""
    blocked = [item for item in project["artifacts"] if item["is_blocked"]]
    return {
        "project_id": project["id"],
        "conflicts": [one for item in blocked for one in item["blocked_by"] if not one["resolved"]],
        "blocked_artifacts": [item["id"] for item in blocked],
        "generated_at": datetime.now(UTC).isoformat(),
    }
