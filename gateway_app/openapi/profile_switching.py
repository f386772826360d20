"""`/v1/profiles/{agent}/…`: the operations that decide which version requests get."""

from __future__ import annotations

from gateway_app.api.profile_switching import HistoryQuery, UnpinQuery
from gateway_app.openapi.answers.profiles import (
    Activation,
    CanaryFigures,
    CanaryStopped,
    HistoryPage,
    PinState,
    Retired,
)
from gateway_app.openapi.operation import READS_JSON, Operation, Reply
from gateway_app.openapi.requests import MatchHeaders
from gateway_app.profiles.drafts import ActivateVersion, Because, NewCanary, NewPin, Promotion, RollBack
from tasks.errors import (
    AdminRequired,
    BaseUnusable,
    InvalidRequest,
    NotFound,
    ProfileLimit,
    ProfileUnusable,
    ServiceUnavailable,
    UnknownAgent,
    VersionConflict,
)

#: What trying a version can end with.
TRIED = (AdminRequired, BaseUnusable, ProfileUnusable, ServiceUnavailable)
_CHANGES = (*READS_JSON, AdminRequired, UnknownAgent, NotFound, VersionConflict, ProfileLimit)
_REASON = {"author": "Ada", "reason": "Answers were too long."}
_BECAUSE = {"reason": _REASON}
_WARMED = "The version is computed on workers first, if there are any; `warm_s` says how long that may take."

SWITCHING = (
    Operation(
        "post",
        "/v1/profiles/{agent}/activate",
        "activateVersion",
        "profiles",
        "Make a version the active one",
        {200: Reply("It is active for every request from now on.", Activation)},
        errors=(*_CHANGES, *TRIED),
        description="Ends a canary. With its first use it is settled what a version inherits. " + _WARMED,
        body=ActivateVersion,
        bodies={"first": {"version": 1, **_REASON}},
        headers=MatchHeaders,
    ),
    Operation(
        "post",
        "/v1/profiles/{agent}/rollback",
        "rollBack",
        "profiles",
        "Make the version active again that was so before",
        {200: Reply("It is active for every request from now on.", Activation)},
        errors=(*_CHANGES, *TRIED),
        description="Sent twice it leads back again: name the version, or send If-Match, where it may be repeated. "
        + _WARMED,
        body=RollBack,
        bodies=_BECAUSE,
        body_required=False,
        headers=MatchHeaders,
    ),
    Operation(
        "post",
        "/v1/profiles/{agent}/retire",
        "retireAgent",
        "profiles",
        "Take an agent out of use",
        {200: Reply("Requests that name it are refused; activating a version brings it back.", Retired)},
        errors=_CHANGES,
        body=Because,
        bodies=_BECAUSE,
        body_required=False,
        headers=MatchHeaders,
    ),
    Operation(
        "get",
        "/v1/profiles/{agent}/history",
        "listChanges",
        "profiles",
        "List what was done to an agent, the newest first",
        {200: Reply("A page of it.", HistoryPage)},
        errors=(InvalidRequest, UnknownAgent, NotFound),
        query=HistoryQuery,
    ),
    Operation(
        "put",
        "/v1/profiles/{agent}/canary",
        "setCanary",
        "profiles",
        "Run a version beside the active one",
        {200: Reply("It gets its share of the requests from now on.", CanaryFigures)},
        errors=(*_CHANGES, *TRIED),
        description="A request's id decides which of the two it gets. " + _WARMED,
        body=NewCanary,
        bodies={"tenth": {"version": 2, "share": 0.1, **_REASON}},
        headers=MatchHeaders,
    ),
    Operation(
        "get",
        "/v1/profiles/{agent}/canary",
        "getCanary",
        "profiles",
        "Compare a canary with the active version",
        {200: Reply("What became of the requests of both, since the canary began.", CanaryFigures)},
        errors=(UnknownAgent, NotFound),
    ),
    Operation(
        "post",
        "/v1/profiles/{agent}/canary/promote",
        "promoteCanary",
        "profiles",
        "Make the canary the active version",
        {200: Reply("It is active for every request from now on.", Activation)},
        errors=(*_CHANGES, *TRIED),
        description=_WARMED,
        body=Promotion,
        bodies=_BECAUSE,
        body_required=False,
        headers=MatchHeaders,
    ),
    Operation(
        "post",
        "/v1/profiles/{agent}/canary/stop",
        "stopCanary",
        "profiles",
        "Stop the canary",
        {200: Reply("All requests get the active version.", CanaryStopped)},
        errors=_CHANGES,
        body=Because,
        bodies=_BECAUSE,
        body_required=False,
        headers=MatchHeaders,
    ),
    Operation(
        "put",
        "/v1/profiles/{agent}/pin",
        "pinAgent",
        "profiles",
        "Keep an agent's active version computed",
        {200: Reply("Workers compute it now, and again whenever it is lost.", PinState)},
        errors=(*_CHANGES, ProfileUnusable),
        body=NewPin,
        bodies={"two": {"copies": 2, **_REASON}},
        body_required=False,
        headers=MatchHeaders,
    ),
    Operation(
        "get",
        "/v1/profiles/{agent}/pin",
        "getPin",
        "profiles",
        "Show whether an agent is pinned, and where its active version is computed",
        {200: Reply("As the workers last reported.", PinState)},
        errors=(UnknownAgent, NotFound),
    ),
    Operation(
        "delete",
        "/v1/profiles/{agent}/pin",
        "unpinAgent",
        "profiles",
        "Stop keeping an agent's active version computed",
        {200: Reply("It makes room when others need it.", PinState)},
        errors=(InvalidRequest, AdminRequired, UnknownAgent, NotFound, VersionConflict, ProfileLimit),
        query=UnpinQuery,
        headers=MatchHeaders,
    ),
)
