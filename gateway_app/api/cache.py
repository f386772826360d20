"""`/v1/cache`: what the workers' KV caches hold of one's own profiles. Any key of the organization may look."""

from __future__ import annotations

from flask import Blueprint, Response, g, jsonify
from pydantic import Field

from gateway_app.api import reading
from gateway_app.governance.api_keys import ApiKeys
from gateway_app.kv_cache import documents
from gateway_app.kv_cache.own import PLACE, OwnProfiles, Place
from gateway_app.kv_cache.view import CacheView
from tasks.job import Frozen, Name


class CacheQuery(Frozen):
    """Which profiles a page shows, by agent and version."""

    agent: Name | None = Field(default=None, description="Only profiles of this agent.")
    after: str | None = Field(default=None, pattern=PLACE, description="`next` of the page before.")
    limit: int = Field(default=20, ge=1, le=reading.MAX_PAGE, description="Profiles; the segments come on top.")


def blueprint(keys: ApiKeys, view: CacheView, own: OwnProfiles) -> Blueprint:
    """Return the route, over what it needs."""
    routes = Blueprint("cache", __name__, url_prefix="/v1/cache")

    reading.require_key(routes, keys)

    @routes.get("")
    def show() -> Response:
        wanted = reading.query(CacheQuery)
        after = Place.parse(wanted.after) if wanted.after is not None else None
        found, last = own.page(g.caller.organization, wanted.agent, after, wanted.limit)
        return jsonify(documents.of_organization(view.of(found), str(last) if last is not None else None))

    return routes
