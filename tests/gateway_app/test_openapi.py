"""The OpenAPI document is valid, names what there is, and answers are as it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from flask.testing import FlaskClient

from gateway_app.openai.errors import PATHS
from gateway_app.openapi import error_page
from gateway_app.openapi.document import HEADERS, OPERATIONS, TAGS, document
from gateway_app.openapi.operation import Operation
from gateway_app.openapi.problems import OpenAIError, Problem
from gateway_app.openapi.requests import PATH_PARAMETERS
from gateway_app.openapi.rules import OF_FIELDS, OF_MODELS
from tests.conforming import BY_ROUTE, conforming_events, conforms, path_of
from tests.serving import Served, standing

TASK = {"agent": "incident-responder", "directive": "What now?", "sampling": {"max_tokens": 8}}
CHAT = {"model": "incident-responder", "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 8}
#: What OpenAPI 3.1 says that schemas are written in.
DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: What Flask answers to by itself.
IMPLIED = {"HEAD", "OPTIONS"}


@pytest.fixture
def database_kind() -> str:
    """Return SQLite: what a database is like is no matter here."""
    return "sqlite"


each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


def test_it_is_openapi() -> None:
    """Valid by the specification's own schema, and without a reference that leads nowhere."""
    written = document()
    schemathesis.openapi.from_dict(written).validate()
    for schema in written["components"]["schemas"].values():
        jsonschema_rs.meta.validate({"$schema": DIALECT, **schema})
    for reference in references(written):
        place: Any = written
        for name in reference.removeprefix("#/").split("/"):
            place = place[name]


def test_it_is_served_without_a_key(client: FlaskClient) -> None:
    """For tools that know nothing of the gateway yet."""
    del client.environ_base["HTTP_AUTHORIZATION"]
    answer = client.get("/openapi.json")
    assert (answer.status_code, answer.content_type) == (200, "application/json")
    assert answer.json == document()


def test_it_names_the_routes_that_there_are(client: FlaskClient) -> None:
    """Each route has an operation, and each operation a route."""
    rules = client.application.url_map.iter_rules()
    routes = {(method, path_of(rule.rule)) for rule in rules for method in (rule.methods or set()) - IMPLIED}
    assert routes == set(BY_ROUTE)


def test_it_names_nothing_that_there_is_not() -> None:
    """Parameters of paths, tags, headers, targets of links, rules: a name that is mistyped does nothing."""
    names = [operation.name for operation in OPERATIONS]
    assert len(set(names)) == len(names)
    replies = [reply for operation in OPERATIONS for reply in operation.replies.values()]
    assert {operation.tag for operation in OPERATIONS} == set(TAGS)
    assert {name for reply in replies for name in reply.headers} <= set(HEADERS)
    assert {link.operation for reply in replies for link in reply.links} <= set(names)
    parameters = {part[1:-1] for operation in OPERATIONS for part in operation.path.split("/") if part.startswith("{")}
    assert parameters == set(PATH_PARAMETERS)
    schemas = document()["components"]["schemas"]
    assert OF_MODELS.keys() <= schemas.keys()
    fields = {model.__name__: set(model.model_fields) for each in OPERATIONS if (model := each.query) is not None}
    # A model that is sent as well as read has two components.
    fields |= {name.removesuffix("-Input"): set(schema.get("properties", ())) for name, schema in schemas.items()}
    assert [(name, field) for name, field in OF_FIELDS if field not in fields[name]] == []


@each_operation
def test_examples_are_as_they_should_be(operation: Operation) -> None:
    """Those of requests are what the code takes, those of answers what it gives, and there are some of bodies."""
    assert bool(operation.bodies) is (operation.body is not None)
    for example in operation.bodies.values():
        assert operation.body is not None
        if operation.body_media_type == "application/json":
            operation.body.model_validate(example)
    for reply in operation.replies.values():
        if reply.example is not None:
            assert reply.model is not None
            reply.model.model_validate_json(json.dumps(reply.example), strict=True)


def test_errors_are_as_they_are_shown() -> None:
    """Every example of an error is one of its model."""
    for name, answer in document()["components"]["responses"].items():
        for content in answer["content"].values():
            for example in content["examples"].values():
                model = OpenAIError if name.startswith("openai.") else Problem
                model.model_validate_json(json.dumps(example["value"]), strict=True)


def test_the_page_of_errors_is_fresh() -> None:
    """`python -m gateway_app.openapi.error_page` writes it."""
    assert error_page.PAGE.read_text("utf-8") == error_page.page()


def test_strangers(client: FlaskClient) -> None:
    """Without a key every operation answers 401, as documented, but for those that are public."""
    del client.environ_base["HTTP_AUTHORIZATION"]
    for operation in OPERATIONS:
        answer = client.open(path(operation), method=operation.method.upper())
        assert (answer.status_code == 401) is not operation.public, operation.name
        conforms(operation.method.upper(), operation.path, answer.status_code, dict(answer.headers), answer.data)


def test_other_methods(client: FlaskClient) -> None:
    """A method that the path does not have is answered with those it has, in the form of the path's errors."""
    for operation in OPERATIONS:
        allowed = {method for method, of in BY_ROUTE if of == operation.path}
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE"} - allowed:
            answer = client.open(path(operation), method=method)
            assert (answer.status_code, set(answer.headers["Allow"].split(", ")) - IMPLIED) == (405, allowed)
            error = answer.json["error"] if operation.path.startswith(PATHS) else answer.json
            assert error["code"] == "method_not_allowed"
        if not operation.websocket:
            assert set(client.options(path(operation)).headers["Allow"].split(", ")) - IMPLIED == allowed


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    """Return a gateway with a worker; it fails at the end if an answer was not as documented."""
    with standing(tmp_path_factory.mktemp("gateway"), tiny_model, ENGINE__OPTIONS='{"time_scale": 0}') as made:
        yield made


@pytest.fixture
def call(served: Served) -> Callable[..., requests.Response]:
    """Return how to call it."""

    def call(method: str, path: str, **options: Any) -> requests.Response:
        headers = served.headers | options.pop("headers", {})
        return requests.request(method, served.url + path, headers=headers, timeout=30, **options)

    return call


Call = Callable[..., requests.Response]


def test_tasks_are_as_documented(call: Call) -> None:
    """From submitting to the end, as polled, listed and streamed, whole and from a cursor on."""
    for more in ({}, {"n": 2}, {"logprobs": 1}):
        task = {**TASK, "sampling": {"max_tokens": 8, **more}, "metadata": {"team": "blue"}}
        submitted = call("POST", "/v1/tasks", json=task, headers={"Idempotency-Key": f"key-{more}"})
        assert submitted.status_code == 202
        path = submitted.json()["links"]["self"]
        names = conforming_events("watchTask", call("GET", f"{path}/events").text)
        assert (names[0], names[-1]) == ("started", "completed")
        shown = call("GET", path).json()
        assert shown["status"] == "completed"
        assert ("choices" in shown["result"], "logprobs" in shown["result"]) == ("n" in more, "logprobs" in more)
        assert call("GET", f"{path}/events", params={"cursor": "1-0"}).status_code == 200
        assert call("DELETE", path).status_code == 409
        assert call("POST", "/v1/tasks", json=task, headers={"Idempotency-Key": f"key-{more}"}).status_code == 202
    assert call("GET", "/v1/tasks", params={"limit": 2, "api": "tasks"}).json()["has_more"]


def test_a_cancelled_task_is_as_documented(client: FlaskClient) -> None:
    """While it waits for a worker."""
    path = client.post("/v1/tasks", json={**TASK, "deadline": "2100-01-01T00:00:00Z"}).json["links"]["self"]
    assert client.get(path).json["status"] == "queued"
    assert [client.delete(path).status_code for _ in range(2)] == [200, 200]
    assert conforming_events("watchTask", client.get(f"{path}/events").text) == ["cancelled"]
    assert client.get(path).json["error"]["code"] == "cancelled"
    assert client.get("/readyz").json["status"] == "degraded"


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}], ids=str)
def test_chat_is_as_documented(call: Call, more: dict[str, Any]) -> None:
    """Whole, and in chunks."""
    assert call("POST", "/v1/chat/completions", json={**CHAT, **more}).status_code == 200
    body = {**CHAT, **more, "stream": True, "stream_options": {"include_usage": True}}
    assert len(conforming_events("createChatCompletion", call("POST", "/v1/chat/completions", json=body).text)) > 3


def test_models_are_as_documented(call: Call) -> None:
    """All, one, and none."""
    names = [model["id"] for model in call("GET", "/v1/models").json()["data"]]
    assert [call("GET", f"/v1/models/{name}").status_code for name in (*names, "nobody", "no\nbody")] == [
        *[200] * len(names),
        *[404, 404],
    ]


@pytest.mark.parametrize(
    "more", [{}, {"temperature": 0.5, "user": "somebody"}, {"instructions": "!", "metadata": {"a": "b"}}], ids=str
)
def test_responses_are_as_documented(call: Call, more: dict[str, Any]) -> None:
    """Whole, streamed, in the background, continued, and what they answered."""
    body = {"model": TASK["agent"], "input": "Hello?", "max_output_tokens": 64, **more}
    made = call("POST", "/v1/responses", json=body)
    assert made.status_code == 200, made.text
    assert conforming_events("createResponse", call("POST", "/v1/responses", json={**body, "stream": True}).text)
    path = f"/v1/responses/{made.json()['id']}"
    assert conforming_events("getResponse", call("GET", path, params={"stream": "true"}).text)
    assert call("GET", path).json() == made.json()
    assert call("GET", f"{path}/input_items").json()["data"]
    assert call("POST", f"{path}/cancel").status_code == 409
    assert call("POST", "/v1/responses", json={**body, "background": True}).status_code == 200


def path(operation: Operation) -> str:
    """Return a path of the operation, to nothing that there is."""
    return operation.path.replace("{", "").replace("}", "")


def references(value: Any) -> Iterator[str]:
    """Yield all references in a document."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "$ref":
                yield inner
            else:
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)
