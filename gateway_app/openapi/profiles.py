"""`/v1/profiles`: the operations on agents and their versions."""

from __future__ import annotations

from typing import Any

from gateway_app.api.profiles import DiffQuery, ProfileQuery
from gateway_app.openapi.answers.profiles import Activation, ProfileDiff, ProfileDocument, ProfilePage, Version
from gateway_app.openapi.operation import READS_JSON, Link, Operation, Reply
from gateway_app.openapi.requests import MatchHeaders
from gateway_app.profiles.drafts import ActivateVersion, NewAgent, NewVersion
from tasks.errors import (
    InvalidRequest,
    NotFound,
    ProfileExists,
    ProfileLimit,
    ProfileUnusable,
    UnknownAgent,
    VersionConflict,
)

TEXT: dict[str, Any] = {
    "description": "Reads alerts.",
    "segments": [
        {"kind": "agent_base_profile", "text": "You work for the operations team."},
        {"kind": "role", "text": "You read alerts and name the most likely cause."},
    ],
}
HAS_AGENT = {"agent": "$response.body#/agent"}
HAS_VERSION = {**HAS_AGENT, "number": "$response.body#/version"}

OPERATIONS = (
    Operation(
        "get",
        "/v1/profiles",
        "listProfiles",
        "profiles",
        "List the agents, by name",
        {200: Reply("A page of them.", ProfilePage)},
        errors=(InvalidRequest,),
        query=ProfileQuery,
    ),
    Operation(
        "post",
        "/v1/profiles",
        "createProfile",
        "profiles",
        "Make an agent",
        {
            201: Reply(
                "It has one version, which is active if that was asked for.",
                ProfileDocument,
                headers=("Location", "ETag"),
                links=(Link("getProfile", HAS_AGENT), Link("addVersion", HAS_AGENT)),
            )
        },
        errors=(*READS_JSON, ProfileExists, ProfileLimit, ProfileUnusable),
        body=NewAgent,
        bodies={"responder": {"agent": "alert-reader", **TEXT, "activate": True}},
    ),
    Operation(
        "get",
        "/v1/profiles/{agent}",
        "getProfile",
        "profiles",
        "Show an agent with its versions",
        {200: Reply("The agent.", ProfileDocument, headers=("ETag",))},
        errors=(UnknownAgent, NotFound),
    ),
    Operation(
        "post",
        "/v1/profiles/{agent}/versions",
        "addVersion",
        "profiles",
        "Add a version",
        {
            201: Reply(
                "It is the newest one, and active if that was asked for.",
                Version,
                headers=("Location",),
                links=(Link("getVersion", HAS_VERSION),),
            )
        },
        errors=(*READS_JSON, UnknownAgent, NotFound, VersionConflict, ProfileLimit, ProfileUnusable),
        description="`base_version` or If-Match refuse it if somebody else added a version in the meantime.",
        body=NewVersion,
        bodies={"responder": TEXT},
        headers=MatchHeaders,
    ),
    Operation(
        "get",
        "/v1/profiles/{agent}/versions/{number}",
        "getVersion",
        "profiles",
        "Show a version with its text",
        {200: Reply("The version.", Version)},
        errors=(NotFound,),
    ),
    Operation(
        "post",
        "/v1/profiles/{agent}/activate",
        "activateVersion",
        "profiles",
        "Make a version the active one",
        {200: Reply("It is active for every request from now on.", Activation)},
        errors=(*READS_JSON, UnknownAgent, NotFound, ProfileUnusable),
        body=ActivateVersion,
        bodies={"first": {"version": 1}},
    ),
    Operation(
        "get",
        "/v1/profiles/{agent}/diff",
        "compareVersions",
        "profiles",
        "Compare two versions",
        {200: Reply("What changed.", ProfileDiff)},
        errors=(InvalidRequest, NotFound),
        query=DiffQuery,
    ),
)
