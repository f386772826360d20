"""`/v1/profiles/{agent}/export` and `/v1/profiles/import`: profiles as YAML."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Blueprint, Response, g, jsonify, request
from pydantic import Field

from gateway_app.api import reading
from gateway_app.profiles.comparison import Comparison
from gateway_app.profiles.drafts import Because, VersionNumber
from gateway_app.profiles.editor import because
from gateway_app.profiles.management import ProfileManagement
from gateway_app.profiles.transfer import export
from tasks.errors import NotFound, UnsupportedMediaType
from tasks.job import Frozen

YAML = "application/yaml"
#: What clients call it that were made before the type had a name.
YAML_TYPES = (YAML, "application/x-yaml", "text/yaml", "text/x-yaml")


class ExportQuery(Frozen):
    """Which version is exported."""

    version: VersionNumber | None = Field(default=None, description="Left out, the active one.")


class ImportQuery(Because):
    """Whether anything is done, and who does it why."""

    dry_run: bool = Field(default=False, description="Only tell what would come of it.")


def add_routes(
    profiles: Blueprint, management: ProfileManagement, difference: Callable[[Comparison], dict[str, Any]]
) -> None:
    """Add the routes to those of /v1/profiles; `difference` writes how two versions differ."""
    catalogue, transfer = management.catalogue, management.transfer

    @profiles.get("/<agent:agent>/export")
    def export_version(agent: str) -> Response:
        wanted = reading.query(ExportQuery)
        organization, number = g.caller.organization, wanted.version
        if number is None:
            active = catalogue.overview(organization, agent).active
            if active is None:
                raise NotFound(f"no version of {agent!r} is active; name one")
            profile = catalogue.text(organization, agent, active)
        else:
            profile = catalogue.version(organization, agent, number)[1]
        return Response(export(profile), mimetype=YAML)

    @profiles.post("/import")
    def import_version() -> tuple[Response, int]:
        wanted = reading.query(ImportQuery)
        if request.mimetype not in YAML_TYPES:
            raise UnsupportedMediaType(f"a profile is imported as {YAML}")
        file = transfer.read(reading.content())
        done = transfer.take(g.caller.organization, because(g.caller, wanted), file, dry_run=wanted.dry_run)
        document = {
            "agent": done.agent,
            "action": done.action,
            "dry_run": wanted.dry_run,
            "from_version": done.from_version,
            "newest_version": done.newest,
            "version": done.version,
            "difference": None if done.comparison is None else difference(done.comparison),
        }
        return jsonify(document), 201 if done.version is not None else 200
