"""`/v1/profiles/{agent}/…`: which version requests get, and what was done about that."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from flask import Blueprint, Response, g, jsonify
from pydantic import Field, StringConstraints

from gateway_app.api import reading
from gateway_app.api.pages import listing
from gateway_app.profiles.catalogue import Catalogue, Overview
from gateway_app.profiles.drafts import ActivateVersion, Because, NewCanary, NewPin, Promotion, RollBack
from gateway_app.profiles.management import ProfileManagement
from gateway_app.profiles.pins import Pinned
from gateway_app.profiles.switching import Activated
from gateway_app.profiles.warming import Warmth
from tasks.errors import NotFound
from tasks.ids import PATTERN
from tasks.job import Frozen


class HistoryQuery(Frozen):
    """Which page of an agent's history is shown, the newest change first."""

    after: Annotated[str, StringConstraints(pattern=f"^{PATTERN}$")] | None = Field(
        default=None, description="The last id of the page before."
    )
    limit: int = Field(default=20, ge=1, le=reading.MAX_PAGE)


class UnpinQuery(Because):
    """Who unpins an agent, and why."""


def add_routes(profiles: Blueprint, management: ProfileManagement) -> None:
    """Add the routes to those of /v1/profiles."""
    catalogue, switch = management.catalogue, management.switch

    @profiles.post("/<agent:agent>/activate")
    def activate(agent: str) -> Response:
        wanted = reading.document(ActivateVersion)
        return jsonify(_activated(catalogue, agent, switch.activate(g.caller, agent, wanted, reading.expected_tags())))

    @profiles.post("/<agent:agent>/rollback")
    def roll_back(agent: str) -> Response:
        wanted = reading.options(RollBack)
        return jsonify(_activated(catalogue, agent, switch.roll_back(g.caller, agent, wanted, reading.expected_tags())))

    @profiles.post("/<agent:agent>/retire")
    def retire(agent: str) -> Response:
        why = reading.options(Because)
        before = switch.retire(g.caller, agent, why, reading.expected_tags())
        return jsonify(agent=agent, retired=True, previous_version=before)

    @profiles.get("/<agent:agent>/history")
    def history(agent: str) -> Response:
        wanted = reading.query(HistoryQuery)
        organization = g.caller.organization
        catalogue.overview(organization, agent)
        found = management.history.page(organization, agent, wanted.after, wanted.limit + 1)
        return listing(found, wanted.limit, _change)


def add_canary_routes(profiles: Blueprint, management: ProfileManagement) -> None:
    """Add those on a version that runs beside the active one."""
    catalogue, switch = management.catalogue, management.switch

    @profiles.put("/<agent:agent>/canary")
    def set_canary(agent: str) -> Response:
        wanted = reading.document(NewCanary)
        warmth = switch.set_canary(g.caller, agent, wanted, reading.expected_tags())
        return jsonify({**figures(agent), "warm": warm(warmth)})

    @profiles.get("/<agent:agent>/canary")
    def show_canary(agent: str) -> Response:
        return jsonify(figures(agent))

    @profiles.post("/<agent:agent>/canary/promote")
    def promote_canary(agent: str) -> Response:
        why = reading.options(Promotion)
        return jsonify(
            _activated(catalogue, agent, switch.promote_canary(g.caller, agent, why, reading.expected_tags()))
        )

    @profiles.post("/<agent:agent>/canary/stop")
    def stop_canary(agent: str) -> Response:
        why = reading.options(Because)
        switch.stop_canary(g.caller, agent, why, reading.expected_tags())
        return jsonify(agent=agent, canary=None)

    def figures(agent: str) -> dict[str, Any]:
        """Return how an agent's canary and its active version do, side by side. Raises NotFound if there is none."""
        organization = g.caller.organization
        overview = catalogue.overview(organization, agent)
        trial, active, row = canary(overview), overview.active, overview.row
        if trial is None or active is None or row is None or row.canary_since is None:
            raise NotFound(f"{agent!r} has no canary")
        versions = (active.version, trial["version"])
        of_active, of_canary = management.figures.since(organization, agent, versions, row.canary_since)
        return {"agent": agent, **trial, "active": asdict(of_active), "canary": asdict(of_canary)}


def add_pin_routes(profiles: Blueprint, management: ProfileManagement) -> None:
    """Add those on copies that are kept warm."""
    pins = management.pins

    @profiles.put("/<agent:agent>/pin")
    def pin(agent: str) -> Response:
        wanted = reading.options(NewPin)
        return jsonify(_pinned(agent, pins.pin(g.caller, agent, wanted, reading.expected_tags())))

    @profiles.get("/<agent:agent>/pin")
    def show_pin(agent: str) -> Response:
        return jsonify(_pinned(agent, pins.show(g.caller.organization, agent)))

    @profiles.delete("/<agent:agent>/pin")
    def unpin(agent: str) -> Response:
        why = reading.query(UnpinQuery)
        return jsonify(_pinned(agent, pins.unpin(g.caller, agent, why, reading.expected_tags())))


def warm(warmth: Warmth | None) -> dict[str, Any] | None:
    """Return how warm a version was when requests began to get it, as it is sent."""
    if warmth is None:
        return None
    return {
        "copies": warmth.copies,
        "workers": list(warmth.workers),
        "waited_s": round(warmth.waited_s, 3),
        "why": warmth.why,
    }


def _pinned(agent: str, pinned: Pinned) -> dict[str, Any]:
    seen = pinned.seen
    return {
        "agent": agent,
        "copies": pinned.copies,
        "active_version": pinned.version,
        "static_profile_hash": pinned.static_profile_hash,
        "workers": None if seen is None else list(seen.holders),
        "computing": None if seen is None else list(seen.computing),
    }


def _activated(catalogue: Catalogue, agent: str, done: Activated) -> dict[str, Any]:
    return {
        "agent": agent,
        "active_version": done.active.profile.version,
        "previous_version": done.previous_version,
        "static_profile_hash": done.active.static_profile_hash,
        "static_token_count": done.active.static_token_count,
        "joinable": done.active.layout.joinable,
        "least_prompt_tokens": done.least_prompt_tokens,
        "context_window": done.context_window,
        "warm": warm(done.warmth),
        "children_behind": catalogue.children_behind(g.caller.organization, agent),
    }


def canary(overview: Overview) -> dict[str, Any] | None:
    """Return the trial that an agent has, as it is sent."""
    row = overview.row
    version = row.canary(overview.shipped) if row else None
    if row is None or version is None or row.canary_since is None:
        return None
    return {"version": version, "share": row.canary_share, "since": row.canary_since.isoformat()}


def _change(row: Any) -> dict[str, Any]:
    names = ("action", "from", "to", "author", "reason", "share", "canary_ended", "rebased_from", "copies")
    pins = row.details.get("pins")
    return {
        "id": row.request_id,
        "at": row.occurred_at.isoformat(),
        "by": row.api_key_id,
        **{name: row.details.get(name) for name in names},
        "pins": None if pins is None else [{"agent": agent, "version": version} for agent, version in pins],
        "static_profile_hash": row.static_profile_hash,
    }
