"""All unresolved conflicts of a project, page by page.

The first page tells how many there are in all, and the rest are asked for together, up to a bound. How large a page is
shows in the first one, whatever was asked for: a server may have a limit of its own, or know no pages and send all at
once. One that sends the same page again and again adds nothing, and conflicts that are resolved between two pages move
others from one to the next. So it is counted what has come, by id, and what is missing from the total is told: nobody
can say of that whether it is critical.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import ceil

from tasks.governance.metaqore.answers import Conflict, ConflictPage
from tasks.governance.metaqore.outcomes import Condition

PAGE_SIZE = 100
MAX_PAGES = 20


@dataclass(frozen=True, slots=True)
class Listing:
    """The conflicts that were read, in whatever state, some perhaps twice.

    `unread` is how many more there are; None if `failure` kept the gateway from learning it.
    """

    conflicts: tuple[Conflict, ...] = ()
    unread: int | None = None
    failure: Condition | None = None


async def read_all(page: Callable[[int], Awaitable[ConflictPage | Condition]]) -> Listing:
    """Return what there is. `page` asks for one page, counted from 1, and gives what kept it from an answer."""
    first = await page(1)
    if not isinstance(first, ConflictPage):
        return Listing(failure=first)
    answers: list[ConflictPage | Condition] = [first]
    if 0 < len(first.conflicts) < first.total:
        count = min(ceil(first.total / len(first.conflicts)), MAX_PAGES)
        answers += await asyncio.gather(*(page(number) for number in range(2, count + 1)))
    pages = [answer for answer in answers if isinstance(answer, ConflictPage)]
    found = tuple(conflict for answer in pages for conflict in answer.conflicts)
    missing = max(answer.total for answer in pages) - len({conflict.id for conflict in found})
    failure = next((answer for answer in answers if not isinstance(answer, ConflictPage)), None)
    return Listing(found, None if failure else max(0, missing), failure)
