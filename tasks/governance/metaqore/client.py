"""MetaQore over HTTP: four questions about a project, asked at once, each answer read within one deadline.

A socket's timeout begins anew with every byte, so a server that sends one byte a second can hold a blocking client for
hours, and nothing interrupts a name that is being looked up. Here everything from the look-up to the last byte runs
on an event loop, where one deadline ends whatever is still under way. Redirects are not followed: a key goes to no
server but the one that was configured. Answers are read up to a size, uncompressed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

import aiohttp
from pydantic import ValidationError

from tasks.governance.metaqore.answers import (
    Answered,
    ConflictPage,
    ConflictsEnvelope,
    HealthEnvelope,
    ProjectEnvelope,
    Refusal,
    ReportEnvelope,
)
from tasks.governance.metaqore.conflicts import PAGE_SIZE, read_all
from tasks.governance.metaqore.outcomes import Condition, Mode
from tasks.governance.metaqore.snapshot import Snapshot
from tasks.logs import get_logger
from tasks.settings import MetaqoreGroup

API = "/api/v1"
#: The part of the timeout that the server gets; the rest is for handing the answers to the thread that waits.
DEADLINE = 0.9
_CHUNK_BYTES = 64 * 1024
_HTTP_OK, _HTTP_NOT_FOUND, _HTTP_TOO_MANY, _HTTP_SERVER = 200, 404, 429, 500
_HTTP_AUTH = (401, 403)
logger = get_logger(__name__)
Envelope = TypeVar("Envelope", bound=Answered)


class Failed(Exception):
    """The question was not answered; `condition` says why."""

    def __init__(self, condition: Condition) -> None:
        super().__init__(condition)
        self.condition = condition


class Client:
    """Asks one server. All its methods belong to the thread of the event loop; `api_key` may be None.

    `wall_clock` returns the time of day, which `as_of` is.
    """

    def __init__(
        self,
        settings: MetaqoreGroup,
        api_key: str | None,
        wall_clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        base = settings.url or ""
        self._base = base if base.endswith(API) else base + API
        self._settings = settings
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._wall_clock = wall_clock
        self._session: aiohttp.ClientSession | None = None

    async def snapshot(self, project_id: str | None) -> Snapshot:
        """Ask about a project, or with None for the mode alone; never raises.

        The id must be well formed: it becomes part of a path.
        """
        as_of = self._wall_clock()
        deadline = asyncio.get_running_loop().time() + self._settings.timeout_s * DEADLINE
        if project_id is None:
            health = await self._health(deadline)
            # A mode that is none of the three is a riddle, but the server is well.
            failure = health.condition if isinstance(health, Failed) and health.condition != "bad_answer" else None
            return Snapshot(as_of, failure, _mode(health))
        about, blocking, listing, health = await asyncio.gather(
            self._attempt(f"/projects/{project_id}", {}, ProjectEnvelope, deadline),
            self._attempt("/governance/blocking-report", {"project_id": project_id}, ReportEnvelope, deadline),
            read_all(lambda page: self._conflicts(project_id, page, deadline)),
            self._health(deadline),
        )
        failures = [answer.condition for answer in (about, blocking) if isinstance(answer, Failed)]
        project = about.data if isinstance(about, ProjectEnvelope) else None
        report = blocking.data if isinstance(blocking, ReportEnvelope) else None
        if project is not None and project.id != project_id:
            project, failures = None, ["bad_answer", *failures]
        if report is not None and report.project_id != project_id:
            report, failures = None, [*failures, "bad_answer"]
        if listing.failure is not None:
            failures.append(listing.failure)
        return Snapshot.of(as_of, failures[0] if failures else None, _mode(health), project, report, listing)

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def _health(self, deadline: float) -> HealthEnvelope | Failed | None:
        """Return the server's mode, unless the settings give one."""
        if self._settings.mode is not None:
            return None
        return await self._attempt("/health", {}, HealthEnvelope, deadline)

    async def _conflicts(self, project_id: str, page: int, deadline: float) -> ConflictPage | Condition:
        """Return a page of the project's unresolved conflicts."""
        query = {"project_id": project_id, "resolved": "false", "page": str(page), "page_size": str(PAGE_SIZE)}
        answer = await self._attempt("/governance/conflicts", query, ConflictsEnvelope, deadline)
        if isinstance(answer, Failed):
            return answer.condition
        about = {answer.data.project_id, *(conflict.project_id for conflict in answer.data.conflicts)}
        return answer.data if about <= {None, project_id} else "bad_answer"

    async def _attempt(
        self, path: str, query: Mapping[str, str], envelope: type[Envelope], deadline: float
    ) -> Envelope | Failed:
        try:
            async with asyncio.timeout_at(deadline):
                status, body = await self._get(path, query)
            return envelope.model_validate_json(body) if status == _HTTP_OK else _refused(status, body)
        except TimeoutError:
            return Failed("timeout")
        except Failed as failed:
            return failed
        except (ValidationError, aiohttp.ClientResponseError, aiohttp.ClientPayloadError):
            return Failed("bad_answer")
        except (aiohttp.ClientError, OSError):
            return Failed("unreachable")
        except Exception as error:
            # A hostile answer may make the library raise what it does not document. Nobody but MetaQore is to blame.
            logger.error("reading MetaQore's answer failed", error=type(error).__name__)
            return Failed("bad_answer")

    async def _get(self, path: str, query: Mapping[str, str]) -> tuple[int, bytes]:
        """Return an answer's status and body. Raises Failed, or what aiohttp raises."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._settings.connections),
                cookie_jar=aiohttp.DummyCookieJar(),
                # The deadline holds for everything; aiohttp's own would only be another one.
                timeout=aiohttp.ClientTimeout(),
                headers=self._headers,
                auto_decompress=False,
            )
        async with self._session.get(self._base + path, params=query, allow_redirects=False) as response:
            if "Content-Encoding" in response.headers:
                raise Failed("bad_answer")
            body = bytearray()
            async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                body += chunk
                if len(body) > self._settings.max_answer_bytes:
                    raise Failed("bad_answer")
            return response.status, bytes(body)


def _mode(health: HealthEnvelope | Failed | None) -> Mode | None:
    return health.data.governance_mode if isinstance(health, HealthEnvelope) else None


def _refused(status: int, body: bytes) -> Failed:
    """Return what a status other than 200 means."""
    if status in _HTTP_AUTH:
        return Failed("unauthorized")
    if status == _HTTP_TOO_MANY or status >= _HTTP_SERVER:
        return Failed("server_error")
    if status == _HTTP_NOT_FOUND:
        # Any server says 404 of a path it does not know; MetaQore says it in its own form.
        Refusal.model_validate_json(body)
        return Failed("project_unknown")
    return Failed("bad_answer")
