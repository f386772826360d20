"""`/v1/cache`: the operation on what workers' caches hold."""

from __future__ import annotations

from gateway_app.api.cache import CacheQuery
from gateway_app.openapi.answers.cache import CachePage
from gateway_app.openapi.operation import Operation, Reply
from tasks.errors import InvalidRequest, QueueUnavailable

OPERATIONS = (
    Operation(
        "get",
        "/v1/cache",
        "showCache",
        "cache",
        "Show what workers hold of your organization's profiles",
        {200: Reply("A page of profiles, with the segments that they share.", CachePage)},
        errors=(InvalidRequest, QueueUnavailable),
        description="A tree, each entry before those that go on from it: a segment with the profiles that share it. Who "
        "holds what is as workers last reported it, within a second; requests and hits are those of this hour of the "
        "clock and the one before. Of other organizations nothing is shown, nor does anything depend on them but whether "
        "a profile had to make room.",
        query=CacheQuery,
    ),
)
