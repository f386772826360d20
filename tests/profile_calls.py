"""Calls that manage profiles, and looks at what they left in the database."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy.engine import Row
from werkzeug.test import TestResponse

from tasks.db import Database
from tasks.schema import audit_events
from tasks.settings import settings

#: An agent whose profile is shipped, in version 1.
SHIPPED = "incident-responder"


def segments(*roles: str) -> list[dict[str, str]]:
    """Return a base and a segment for each role."""
    return [{"kind": "agent_base_profile", "text": "Base."}, *({"kind": "role", "text": role} for role in roles)]


def create(client: FlaskClient, agent: str, *roles: str, **fields: Any) -> TestResponse:
    """Make an agent."""
    return client.post("/v1/profiles", json={"agent": agent, "segments": segments(*roles or ("One.",)), **fields})


def add(client: FlaskClient, agent: str, role: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    """Add a version."""
    body = {"segments": segments(role), **fields}
    return client.post(f"/v1/profiles/{agent}/versions", json=body, headers=headers or {})


def activate(client: FlaskClient, agent: str, version: int) -> TestResponse:
    """Make a version active."""
    return client.post(f"/v1/profiles/{agent}/activate", json={"version": version})


def draft(client: FlaskClient, agent: str, extends: str | None, *roles: str, **fields: Any) -> TestResponse:
    """Make an agent of roles alone, on a base."""
    body = {"agent": agent, "extends": extends, "segments": [{"kind": "role", "text": role} for role in roles]}
    return client.post("/v1/profiles", json={**body, **fields})


def base(client: FlaskClient, agent: str, text: str, **fields: Any) -> TestResponse:
    """Make a base, or another version of one that there is, and make it active."""
    body = {"segments": [{"kind": "agent_base_profile", "text": text}], "activate": True, "abstract": True, **fields}
    made = client.post(f"/v1/profiles/{agent}/versions", json=body)
    return made if made.status_code != 404 else client.post("/v1/profiles", json={"agent": agent, **body})


def change(client: FlaskClient, agent: str, what: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    """Post to one of an agent's paths."""
    return client.post(f"/v1/profiles/{agent}/{what}", json=fields, headers=headers or {})


def events() -> list[Row[Any]]:
    """Return the changes of profiles in the record, in order."""
    query = sa.select(audit_events).where(audit_events.c.kind == "profile_changed")
    return read(query.order_by(audit_events.c.request_id))


def run(client: FlaskClient, agent: str) -> TestResponse:
    """Send a task."""
    return client.post("/v1/tasks", json={"agent": agent, "directive": "What now?"})


def connected(app: Flask, key: str) -> FlaskClient:
    """Return a client that sends the key."""
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
    return client


def recorded(request_id: str) -> tuple[int, str]:
    """Return the profile version and hash that a request was admitted with."""
    columns = (audit_events.c.profile_version, audit_events.c.static_profile_hash)
    query = sa.select(*columns).where(audit_events.c.request_id == request_id, audit_events.c.kind == "admitted")
    row = read(query)[0]
    return row.profile_version, row.static_profile_hash


def read(query: sa.Select[Any] | sa.TextClause) -> list[Row[Any]]:
    """Run a query on the gateway's database."""
    database = Database(settings().database)
    try:
        return database.read(lambda connection: list(connection.execute(query)))
    finally:
        database.close()


def write(statement: sa.Executable) -> None:
    """Change the gateway's database."""
    database = Database(settings().database)
    try:
        database.write(lambda connection: connection.execute(statement) and None)
    finally:
        database.close()
