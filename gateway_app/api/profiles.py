"""`/v1/profiles`: an organization's agents, their versions, and which one is active."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from flask import Blueprint, Response, g, jsonify, request, url_for
from pydantic import Field

from gateway_app.api import reading
from gateway_app.governance.api_keys import ApiKeys
from gateway_app.profiles.catalogue import Catalogue, Entry, Overview
from gateway_app.profiles.changes import state
from gateway_app.profiles.comparison import compare
from gateway_app.profiles.drafts import MAX_VERSION, ActivateVersion, NewAgent, NewVersion, VersionNumber
from gateway_app.profiles.editor import ProfileEditor
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


def blueprint(keys: ApiKeys, catalogue: Catalogue, editor: ProfileEditor) -> Blueprint:
    """Return the routes, over what they need."""
    profiles = Blueprint("profiles", __name__, url_prefix="/v1/profiles")

    reading.require_key(profiles, keys)

    @profiles.before_request
    def check_name() -> None:
        if not _NAME.fullmatch((request.view_args or {}).get("agent", "none")):
            raise NotFound("no agent has a name like this")

    @profiles.get("")
    def index() -> Response:
        wanted = reading.query(ProfileQuery)
        found = catalogue.page(g.caller.organization, wanted.after or "", wanted.limit + 1)
        data = [_overview(overview) for overview in found[: wanted.limit]]
        return jsonify(data=data, has_more=len(found) > wanted.limit)

    @profiles.post("")
    def create() -> tuple[Response, int, dict[str, str]]:
        draft = reading.validate(NewAgent, reading.parse(reading.body()))
        editor.create(g.caller, draft)
        document, tag = _whole(catalogue, draft.agent)
        return jsonify(document), 201, {"Location": url_for("profiles.show", agent=draft.agent), "ETag": tag}

    @profiles.get("/<agent>")
    def show(agent: str) -> tuple[Response, int, dict[str, str]]:
        document, tag = _whole(catalogue, agent)
        return jsonify(document), 200, {"ETag": tag}

    @profiles.post("/<agent>/versions")
    def add(agent: str) -> tuple[Response, int, dict[str, str]]:
        draft = reading.validate(NewVersion, reading.parse(reading.body()))
        version = editor.add(g.caller, agent, draft, _expected_states())
        entry, profile = catalogue.version(g.caller.organization, agent, version)
        location = url_for("profiles.version", agent=agent, number=version)
        return jsonify(_with_text(agent, entry, profile)), 201, {"Location": location}

    @profiles.get("/<agent>/versions/<number>")
    def version(agent: str, number: str) -> Response:
        entry, profile = catalogue.version(g.caller.organization, agent, _number(number))
        return jsonify(_with_text(agent, entry, profile))

    @profiles.post("/<agent>/activate")
    def activate(agent: str) -> Response:
        wanted = reading.validate(ActivateVersion, reading.parse(reading.body()))
        done = editor.activate(g.caller, agent, wanted.version)
        return jsonify(
            agent=agent,
            active_version=wanted.version,
            previous_version=done.previous_version,
            static_profile_hash=done.active.static_profile_hash,
            static_token_count=done.active.static_token_count,
            joinable=done.active.layout.joinable,
            least_prompt_tokens=done.least_prompt_tokens,
            context_window=done.context_window,
        )

    @profiles.get("/<agent>/diff")
    def diff(agent: str) -> Response:
        wanted = reading.query(DiffQuery)
        (_, old), (_, new) = (
            catalogue.version(g.caller.organization, agent, number) for number in (wanted.old, wanted.new)
        )
        found = compare(old, new)
        return jsonify(
            agent=agent,
            **{"from": wanted.old, "to": wanted.new},
            shared_segments=found.shared_segments,
            description_changed=found.description_changed,
            changes=[asdict(change) for change in found.changes],
            text="".join(change.diff for change in found.changes),
        )

    return profiles


def _expected_states() -> frozenset[str] | None:
    """Return the states that If-Match allows the agent to be in; None if it allows any."""
    if "If-Match" not in request.headers or request.if_match.star_tag:
        return None
    # A proxy that compresses answers makes their tags weak ones.
    return frozenset(request.if_match.as_set(include_weak=True))


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text) or int(text) > MAX_VERSION:
        raise NotFound(f"a version is a whole number from 1 to {MAX_VERSION}")
    return int(text)


def _whole(catalogue: Catalogue, agent: str) -> tuple[dict[str, Any], str]:
    """Return the document of an agent with all its versions and the active one's text, and its entity tag."""
    overview, entries = catalogue.show(g.caller.organization, agent)
    active = overview.active
    document = {
        **_overview(overview),
        "activated_at": overview.activated_at.isoformat() if overview.activated_at else None,
        "versions": [_entry(entry) for entry in entries],
        "active": None,
    }
    if active is not None:
        document["active"] = _with_text(agent, active, catalogue.text(g.caller.organization, agent, active))
    return document, f'"{state(overview.newest_version, active.version if active else 0)}"'


def _overview(overview: Overview) -> dict[str, Any]:
    active = overview.active
    return {
        "agent": overview.agent,
        "description": active.description if active else "",
        "source": active.source if active else "api",
        "active_version": active.version if active else None,
        "newest_version": overview.newest_version,
        "version_count": overview.version_count,
        "static_profile_hash": active.static_profile_hash if active else None,
        "static_token_count": active.static_token_count if active else None,
    }


def _entry(entry: Entry) -> dict[str, Any]:
    return {**asdict(entry), "created_at": entry.created_at.isoformat() if entry.created_at else None}


def _with_text(agent: str, entry: Entry, profile: Profile) -> dict[str, Any]:
    segments = [segment.model_dump() for segment in profile.segments]
    return {"agent": agent, **_entry(entry), "segments": segments}
