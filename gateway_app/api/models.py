"""`/v1/models`: the agents and the served model, as OpenAI's clients expect a list of models."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, g, jsonify

from gateway_app.api import reading
from gateway_app.governance.api_keys import ApiKeys
from gateway_app.profiles import Profiles
from tasks.errors import UnknownAgent


def blueprint(keys: ApiKeys, profiles: Profiles, model_name: str) -> Blueprint:
    """Return the routes, over what they need."""
    models = Blueprint("models", __name__, url_prefix="/v1/models")

    reading.require_key(models, keys)

    def known() -> list[dict[str, Any]]:
        agents = [
            {"id": agent, "object": "model", "created": int(created_at.timestamp()), "owned_by": g.caller.organization}
            for agent, created_at in profiles.names(g.caller.organization)
        ]
        return [*agents, {"id": model_name, "object": "model", "created": 0, "owned_by": "metaqore"}]

    @models.get("")
    def index() -> Response:
        return jsonify(object="list", data=known())

    @models.get("/<path:name>")
    def show(name: str) -> Response:
        for model in known():
            if model["id"] == name:
                return jsonify(model)
        raise UnknownAgent("no agent and no model has this name", agents=[model["id"] for model in known()])

    return models
