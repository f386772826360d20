"""The schemas of the models that requests are read with and answers are described by.

Pydantic writes a model in one of two modes: as it is read, or as it is sent. What is sent stays open, so that a client
made from the document today takes an answer that has one field more tomorrow; a request is as strict as the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema
from pydantic_core import core_schema

from gateway_app.openapi.operation import Operation
from gateway_app.openapi.problems import OpenAIError, Problem
from gateway_app.openapi.rules import OF_FIELDS, OF_MODELS

Model = type[BaseModel]
Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Components:
    """References to the schemas of bodies and of answers, and the schemas of parameters, by their models.

    `schemas` are the components by name.
    """

    bodies: dict[Model, Schema]
    answers: dict[Model, Schema]
    parameters: dict[Model, Schema]
    schemas: dict[str, Schema]


def components(operations: Sequence[Operation]) -> Components:
    """Return the schemas of everything that `operations` name."""
    bodies = {each.body: None for each in operations if each.body is not None}
    parameters = {model: None for each in operations for model in (each.query, each.headers) if model is not None}
    answers: dict[Model, None] = dict.fromkeys([*_answers(operations), Problem, OpenAIError])
    wanted: list[tuple[Model, JsonSchemaMode]] = [(model, "validation") for model in (*bodies, *parameters)]
    wanted += [(model, "serialization") for model in answers]
    found, definitions = models_json_schema(
        wanted, ref_template="#/components/schemas/{model}", schema_generator=_Written
    )
    schemas = definitions["$defs"]
    return Components(
        bodies={model: found[model, "validation"] for model in bodies},
        answers={model: found[model, "serialization"] for model in answers},
        # The model of a query or of headers is taken apart into parameters, and is no component.
        parameters={model: schemas.pop(found[model, "validation"]["$ref"].rpartition("/")[2]) for model in parameters},
        schemas=schemas,
    )


def _answers(operations: Sequence[Operation]) -> Iterator[Model]:
    for operation in operations:
        for reply in operation.replies.values():
            if reply.model is not None:
                yield reply.model
            if reply.stream is not None:
                yield from reply.stream.models


class _Written(GenerateJsonSchema):
    """Adds the rules, and leaves out what says nothing: titles, and defaults of what is sent."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002  pydantic passes it
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> Schema:
        written = super().model_schema(schema)
        fields = written.get("properties", {})
        if self.mode == "validation":
            model = schema["cls"].__name__
            written |= OF_MODELS.get(model, {})
            for name, described in fields.items():
                described.update(OF_FIELDS.get((model, name), {}))
        else:
            written.pop("additionalProperties", None)
            for described in fields.values():
                if "default" in described and described["default"] is None:
                    del described["default"]
        return written
