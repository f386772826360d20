"""`/v1/profiles`: an organization's agents, their versions, and which one is active."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from flask import Blueprint, Response, g, jsonify, request, url_for
from flask.blueprints import BlueprintSetupState
from pydantic import Field
from werkzeug.routing import BaseConverter

from gateway_app.api import profile_files, profile_switching, reading
from gateway_app.api.pages import listing
from gateway_app.governance.api_keys import ApiKeys
from gateway_app.profiles.catalogue import Catalogue, Entry, Overview
from gateway_app.profiles.comparison import Comparison, compare
from gateway_app.profiles.drafts import MAX_VERSION, NewAgent, NewVersion, VersionNumber
from gateway_app.profiles.editor import Added
from gateway_app.profiles.management import ProfileManagement
from gateway_app.profiles.pinned import copies
from tasks.errors import NotFound
from tasks.job import Frozen, Name
from tasks.prompts.profile import Profile

#: What a path may name; anything else is not looked for.
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,200}")
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")


class ProfileQuery(Frozen):
    """Which page of the agents a list shows."""

    after: Name | None = Field(default=None, description="The last name of the page before.")
    limit: int = Field(default=20, ge=1, le=reading.MAX_PAGE)


class DiffQuery(Frozen):
    """Which two versions are compared."""

    old: VersionNumber = Field(alias="from")
    new: VersionNumber = Field(alias="to")


class AgentConverter(BaseConverter):
    """Takes any part of a path for an agent's name but `import`, which is a path of its own."""

    regex = r"(?!import$)[^/]+"
    part_isolating = True


def blueprint(keys: ApiKeys, management: ProfileManagement) -> Blueprint:
    """Return the routes, over what they need."""
    catalogue, editor = management.catalogue, management.editor
    profiles = Blueprint("profiles", __name__, url_prefix="/v1/profiles")

    reading.require_key(profiles, keys)

    @profiles.record_once
    def add_converter(state: BlueprintSetupState) -> None:
        state.app.url_map.converters["agent"] = AgentConverter

    @profiles.before_request
    def check_name() -> None:
        if not _NAME.fullmatch((request.view_args or {}).get("agent", "none")):
            raise NotFound("no agent has a name like this")

    @profiles.get("")
    def index() -> Response:
        wanted = reading.query(ProfileQuery)
        found = catalogue.page(g.caller.organization, wanted.after or "", wanted.limit + 1)
        return listing(found, wanted.limit, _overview)

    @profiles.post("")
    def create() -> tuple[Response, int, dict[str, str]]:
        draft = reading.document(NewAgent)
        added = editor.create(g.caller, draft)
        document, tag = _whole(catalogue, draft.agent)
        return (
            jsonify(_told(document, added)),
            201,
            {"Location": url_for("profiles.show", agent=draft.agent), "ETag": tag},
        )

    @profiles.get("/<agent:agent>")
    def show(agent: str) -> tuple[Response, int, dict[str, str]]:
        document, tag = _whole(catalogue, agent)
        return jsonify(document), 200, {"ETag": tag}

    @profiles.post("/<agent:agent>/versions")
    def add(agent: str) -> tuple[Response, int, dict[str, str]]:
        draft = reading.document(NewVersion)
        added = editor.add(g.caller, agent, draft, reading.expected_tags())
        entry, profile = catalogue.version(g.caller.organization, agent, added.version)
        location = url_for("profiles.version", agent=agent, number=added.version)
        return jsonify(_told(_with_text(agent, entry, profile), added)), 201, {"Location": location}

    @profiles.get("/<agent:agent>/versions/<number>")
    def version(agent: str, number: str) -> Response:
        entry, profile = catalogue.version(g.caller.organization, agent, _number(number))
        return jsonify(_with_text(agent, entry, profile))

    @profiles.get("/<agent:agent>/diff")
    def diff(agent: str) -> Response:
        wanted = reading.query(DiffQuery)
        (_, old), (_, new) = (
            catalogue.version(g.caller.organization, agent, number) for number in (wanted.old, wanted.new)
        )
        names = {"agent": agent, "from": wanted.old, "to": wanted.new}
        return jsonify({**names, **difference(compare(old, new))})

    profile_switching.add_routes(profiles, management)
    profile_switching.add_canary_routes(profiles, management)
    profile_switching.add_pin_routes(profiles, management)
    profile_files.add_routes(profiles, management, difference)
    return profiles


def difference(found: Comparison) -> dict[str, Any]:
    """Return how two versions differ, as it is sent."""
    return {
        "shared_segments": found.shared_segments,
        "description_changed": found.description_changed,
        "inheritance_changed": found.inheritance_changed,
        "changes": [asdict(change) for change in found.changes],
        "text": "".join(change.diff for change in found.changes),
    }


def _told(document: dict[str, Any], added: Added) -> dict[str, Any]:
    """Return the answer with how warm the version is, if it became active."""
    return document if added.warmth is None else {**document, "warm": profile_switching.warm(added.warmth)}


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text) or int(text) > MAX_VERSION:
        raise NotFound(f"a version is a whole number from 1 to {MAX_VERSION}")
    return int(text)


def _whole(catalogue: Catalogue, agent: str) -> tuple[dict[str, Any], str]:
    """Return the document of an agent with all its versions and the active one's text, and its entity tag."""
    organization = g.caller.organization
    overview, entries = catalogue.show(organization, agent)
    active, row = overview.active, overview.row
    behind = catalogue.behind(organization, overview)
    document = {
        **_overview(overview),
        "previous_version": overview.previous_version,
        "activated_at": row.activated_at.isoformat() if row and row.activated_at else None,
        "retired_at": row.retired_at.isoformat() if row and row.retired_at else None,
        "canary": profile_switching.canary(overview),
        "behind": {"agent": behind[0].agent, "pinned": behind[0].version, "active": behind[1]} if behind else None,
        "children_behind": catalogue.children_behind(organization, agent),
        "versions": [_entry(entry) for entry in entries],
        "active": None,
    }
    if active is not None:
        document["active"] = _with_text(agent, active, catalogue.text(organization, agent, active))
    return document, f'"{overview.tag}"'


def _overview(overview: Overview) -> dict[str, Any]:
    active = overview.active
    return {
        "agent": overview.agent,
        "description": active.description if active else "",
        "source": active.source if active else "api",
        "abstract": active.abstract if active else False,
        "retired": overview.row is not None and overview.row.retired_at is not None,
        "pinned_copies": copies(overview.row),
        "active_version": active.version if active else None,
        "newest_version": overview.newest_version,
        "version_count": overview.version_count,
        "static_profile_hash": active.static_profile_hash if active else None,
        "static_token_count": active.static_token_count if active else None,
    }


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        **asdict(entry),
        "pins": None if entry.pins is None else [pin._asdict() for pin in entry.pins],
        "created_at": entry.created_at.isoformat() if entry.created_at else None,
        "activated_at": entry.activated_at.isoformat() if entry.activated_at else None,
    }


def _with_text(agent: str, entry: Entry, profile: Profile) -> dict[str, Any]:
    segments = [segment.model_dump(mode="json") for segment in profile.segments]
    return {"agent": agent, **_entry(entry), "segments": segments}
