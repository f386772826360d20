"""A batch's first step: read its file once, store a row for each line, or say everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from sqlalchemy.engine import Connection, Row

from gateway_app.batches import items
from gateway_app.batches.claims import Claim
from gateway_app.batches.items import NewItem
from gateway_app.batches.lines import Problem, check, split
from gateway_app.batches.ports import Services
from tasks.crypto import DecryptionFailed
from tasks.db import now
from tasks.errors import NotFound

#: Problems that are told of one file.
MAX_PROBLEMS = 100
_GROUP_LINES = 500
_GROUP_BYTES = 4 * 2**20
_DUPLICATE = "The custom_id of this request is that of an earlier line; it must be unique in the batch."


def validate(services: Services, claim: Claim, row: Row[Any]) -> Generator[float, None, bool]:
    """Validate the batch's input, leaving the batch `in_progress` or `failed`; stop early if it is cancelled.

    Returns False if it failed, so that nothing is left to do. Yields between bounded pieces of work. A driver that takes
    over begins again from the first line. Raises ClaimLost.
    """
    clear(claim)
    problems: list[Problem] = []
    total = 0
    try:
        for group in _groups(services, row, problems):
            if claim.look().status != "validating":
                return True
            if problems and problems[-1].code == "too_many_tasks":
                break
            total += len(group)
            problems += _store(claim, row.batch_id, group)
            if len(problems) >= MAX_PROBLEMS:
                break
            yield 0
    except (NotFound, DecryptionFailed):
        problems = [Problem("file_unreadable", "The input file cannot be read any more.", None, "input_file_id")]
    if not total and not problems:
        problems.append(Problem("empty_file", "The input file has no requests."))
    if problems:
        clear(claim)
    return claim.write(lambda connection: _conclude(connection, claim, problems, total))


def clear(claim: Claim) -> None:
    """Forget all lines of the batch. Raises ClaimLost."""
    while claim.write(lambda connection: items.clear(connection, claim.batch_id)):
        pass


def _groups(services: Services, row: Row[Any], problems: list[Problem]) -> Iterator[list[NewItem]]:
    """Return the valid lines in groups, some of them empty, and add what is wrong with the others to `problems`."""
    limits = services.limits
    file = services.files.find(row.input_file_id, row.organization, even_expired=True)
    group: list[NewItem] = []
    read = requests = 0
    for line in split(services.files.read(file), limits.max_line_bytes):
        read += 1 + line.length
        requests += not line.blank
        # Blank lines cost time as well.
        if requests > limits.max_lines or line.number > 2 * limits.max_lines:
            problems.append(
                Problem("too_many_tasks", f"A batch may have up to {limits.max_lines} requests.", line.number)
            )
            break
        checked = None if line.blank else check(line, row.endpoint, limits.max_line_bytes)
        if isinstance(checked, Problem):
            problems.append(checked)
        elif checked is not None:
            group.append(NewItem(line.number, checked, line.offset, line.length))
        if len(group) >= _GROUP_LINES or line.number % _GROUP_LINES == 0 or read >= _GROUP_BYTES:
            yield group
            group, read = [], 0
    yield group


def _store(claim: Claim, batch_id: str, group: list[NewItem]) -> list[Problem]:
    if not group:
        return []
    duplicates = claim.write(lambda connection: items.insert(connection, batch_id, group))
    return [Problem("duplicate_custom_id", _DUPLICATE, number, "custom_id") for number in duplicates]


def _conclude(connection: Connection, claim: Claim, problems: list[Problem], total: int) -> bool:
    if not problems:
        claim.move(connection, "validating", "in_progress", {"in_progress_at": now(), "total": total})
        return True
    errors = [problem.as_dict() for problem in sorted(problems, key=lambda item: item.line or 0)[:MAX_PROBLEMS]]
    # If it was cancelled meanwhile, it is not failed any more, but still to be ended.
    return not claim.move(connection, "validating", "failed", {"ended_at": now(), "errors": errors})
