"""`/v1/profiles`: the operations on agents and their versions."""

from __future__ import annotations

from typing import Any

from gateway_app.api.profile_files import YAML, ExportQuery, ImportQuery
from gateway_app.api.profiles import DiffQuery, ProfileQuery
from gateway_app.openapi.answers.profiles import ImportedProfile, ProfileDiff, ProfileDocument, ProfilePage, Version
from gateway_app.openapi.operation import READS_JSON, Link, Operation, Reply
from gateway_app.openapi.profile_switching import SWITCHING, TRIED
from gateway_app.openapi.requests import MatchHeaders
from gateway_app.profiles.drafts import NewAgent, NewVersion, ProfileFile
from tasks.errors import (
    BaseUnusable,
    BodyTooLarge,
    InvalidRequest,
    InvalidYaml,
    NotFound,
    ProfileExists,
    ProfileLimit,
    UnknownAgent,
    UnsupportedMediaType,
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
        errors=(*READS_JSON, ProfileExists, ProfileLimit, *TRIED),
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
        errors=(*READS_JSON, UnknownAgent, NotFound, VersionConflict, ProfileLimit, *TRIED),
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
        "get",
        "/v1/profiles/{agent}/diff",
        "compareVersions",
        "profiles",
        "Compare two versions",
        {200: Reply("What changed.", ProfileDiff)},
        errors=(InvalidRequest, NotFound),
        query=DiffQuery,
    ),
    Operation(
        "get",
        "/v1/profiles/{agent}/export",
        "exportVersion",
        "profiles",
        "Export a version as YAML",
        {200: Reply("A file as governance.profiles_directory holds them.", bytes_types=(YAML,))},
        errors=(InvalidRequest, UnknownAgent, NotFound),
        query=ExportQuery,
    ),
    Operation(
        "post",
        "/v1/profiles/import",
        "importVersion",
        "profiles",
        "Import a version as a draft",
        {
            200: Reply("Nothing was added: it is the newest version already, or this was a dry run.", ImportedProfile),
            201: Reply("A draft was added.", ImportedProfile, links=(Link("getProfile", HAS_AGENT),)),
        },
        errors=(
            *(InvalidYaml, UnsupportedMediaType, BodyTooLarge, InvalidRequest, BaseUnusable),
            *(ProfileExists, ProfileLimit, VersionConflict),
        ),
        body=ProfileFile,
        body_media_type=YAML,
        bodies={"responder": {"agent": "alert-reader", "version": 1, **TEXT}},
        query=ImportQuery,
    ),
    *SWITCHING,
)
