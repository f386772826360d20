"""One operation as OpenAPI writes it."""

from __future__ import annotations

from collections.abc import Iterator

from gateway_app.openapi.components import Components, Schema
from gateway_app.openapi.operation import Link, Operation, Reply, Stream
from gateway_app.openapi.problems import ErrorAnswers
from gateway_app.openapi.requests import CURSOR, PATH_PARAMETERS

_JSON = "application/json"


class Writer:
    """Writes operations, given the schemas they name; `errors` collects the errors they can answer with."""

    def __init__(self, components: Components, errors: ErrorAnswers) -> None:
        self._components = components
        self._errors = errors

    def operation(self, operation: Operation) -> Schema:
        """Return one operation."""
        written: Schema = {
            "operationId": operation.name,
            "tags": [operation.tag],
            "summary": operation.summary,
            "description": _description(operation),
        }
        if operation.public:
            written["security"] = []
        if operation.websocket:
            written["x-websocket"] = True
        if parameters := list(self._parameters(operation)):
            written["parameters"] = parameters
        if operation.body is not None:
            content: Schema = {"schema": self._components.bodies[operation.body]}
            if operation.bodies:
                content["examples"] = {name: {"value": value} for name, value in operation.bodies.items()}
            written["requestBody"] = {
                "required": operation.body_required,
                "content": {operation.body_media_type: content},
            }
        written["responses"] = {
            **{str(status): self._reply(reply) for status, reply in operation.replies.items()},
            **self._errors.of(operation.path, operation.all_errors),
        }
        return written

    def _parameters(self, operation: Operation) -> Iterator[Schema]:
        for name, described in PATH_PARAMETERS.items():
            if f"{{{name}}}" in operation.path:
                yield {"name": name, "in": "path", "required": True, **described}
        for place, model in (("query", operation.query), ("header", operation.headers)):
            if model is None:
                continue
            schema = self._components.parameters[model]
            for name, described in schema["properties"].items():
                parameter = {"name": name, "in": place, "required": name in schema.get("required", ())}
                if "description" in described:
                    parameter["description"] = described["description"]
                yield {**parameter, "schema": _as_sent(described)}

    def _reply(self, reply: Reply) -> Schema:
        content: Schema = {}
        if reply.model is not None:
            content[_JSON] = {"schema": self._components.answers[reply.model]}
            if reply.example is not None:
                content[_JSON]["example"] = reply.example
        if reply.stream is not None:
            content["text/event-stream"] = {"schema": self._event(reply.stream)}
        content |= {media_type: {} for media_type in reply.bytes_types}
        headers = {name: {"$ref": f"#/components/headers/{name}"} for name in reply.headers}
        links = {link.operation: _link(link) for link in reply.links}
        parts = {"headers": headers, "content": content, "links": links}
        return {"description": reply.description, **{name: part for name, part in parts.items() if part}}

    def _event(self, stream: Stream) -> Schema:
        """Return the schema of one event: of its fields, as a client's parser gives them."""
        kinds: list[Schema] = []
        for name, models in stream.events.items():
            payload = {"anyOf": [self._components.answers[model] for model in models]}
            data = {"type": "string", "contentMediaType": _JSON, "contentSchema": payload}
            fields: Schema = {"event": {"const": name}, "data": data}
            if stream.cursors:
                fields["id"] = {"type": "string", "pattern": CURSOR}
            kinds.append({"type": "object", "properties": fields, "required": list(fields)})
        if stream.last is not None:
            kinds.append({"type": "object", "properties": {"data": {"const": stream.last}}, "required": ["data"]})
        return {"description": "One event.", "anyOf": kinds}


def _link(link: Link) -> Schema:
    parts = {"parameters": dict(link.parameters), "requestBody": dict(link.body)}
    return {"operationId": link.operation, **{name: part for name, part in parts.items() if part}}


def _description(operation: Operation) -> str:
    codes = ", ".join(f"`{error.code}`" for error in operation.late_errors)
    ends = f"Once the answer has begun, {codes} may still come." if codes else ""
    return " ".join(filter(None, (operation.description or f"{operation.summary}.", ends)))


def _as_sent(schema: Schema) -> Schema:
    """Return the schema of a parameter, which is left out instead of being null or empty."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    merged = {name: value for name, value in schema.items() if name not in ("anyOf", "description")}
    if len(kinds) == 1:
        merged = {**kinds[0], **merged}
    elif kinds:
        merged["anyOf"] = kinds
    return {name: value for name, value in merged.items() if name != "default" or value not in (None, "")}
