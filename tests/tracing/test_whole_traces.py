"""Traces of real processes, as a collector receives them: a gateway, a worker, a housekeeper, from HTTP to the last frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import requests

from tests.collector import Received
from tests.services import wait_until
from tests.traced_site import CANARY, SOON_S, Site, named, one, traced_site
from tests.websocket_client import WebSocketClient

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Site]:
    """Return processes that all send their spans to one collector."""
    with traced_site(tmp_path_factory.mktemp("traced"), tiny_model) as made:
        yield made


def test_a_stream_of_a_client_that_is_traced(site: Site) -> None:
    """The client's trace goes on through every process, each span below the one that caused it."""
    traced = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=x"}
    with site.post("/v1/chat/completions", site.chat(stream=True), stream=True, **traced) as answer:
        assert b"[DONE]" in answer.content
    for name in ("POST /v1/chat/completions", "process gpu"):
        site.collector.wait(named(name), TRACE)
    spans = site.collector.of(TRACE)
    server = one(spans, "POST /v1/chat/completions")
    assert (server.kind, server.parent, server.service) == ("SERVER", CALLER, "metaqore-gateway")
    assert server.attributes["http.response.status_code"] == 200
    assert server.attributes["metaqore.outcome"] == "completed"
    assert server.attributes["metaqore.stream.broken_off"] is False
    here = [span for span in spans if span.parent == server.id]
    assert [span.name for span in here] == ["governance", "assemble prompt", "commit", "publish gpu"]
    publish = one(spans, "publish gpu")
    assert publish.kind == "PRODUCER"
    attempt = one(spans, "process gpu")
    assert (attempt.kind, attempt.parent, attempt.service) == ("CONSUMER", publish.id, "metaqore-worker")
    assert attempt.attributes["metaqore.attempt"] == 1
    assert attempt.attributes["metaqore.request.id"] == server.attributes["metaqore.request.id"]
    assert attempt.attributes["messaging.message.id"] == publish.attributes["messaging.message.id"]
    assert attempt.attributes["metaqore.queue.wait_ms"] >= 0
    below = [span.name for span in sorted(spans, key=lambda span: span.began) if span.parent == attempt.id]
    assert below == ["commit", f"chat {model_of(spans)}", "commit", "last frame"]
    engine = one(spans, f"chat {model_of(spans)}")
    asked, said = engine.attributes, {"gen_ai.usage.output_tokens": 4, "gen_ai.response.finish_reasons": ["length"]}
    assert said.items() <= asked.items()
    assert asked["gen_ai.operation.name"] == "chat"
    assert asked["gen_ai.provider.name"] == "simulated"
    assert asked["gen_ai.usage.input_tokens"] == one(spans, "assemble prompt").attributes["metaqore.prompt_tokens"]
    assert 0 < asked["gen_ai.response.time_to_first_chunk"] < SOON_S
    assert engine.began < engine.events["first token"] < engine.ended
    # The stream's span is the last to end but for the worker's, which hears that Redis has the last frame.
    assert server.began < server.events["first text"] < server.ended
    assert server.ended >= engine.ended
    assert not [span for span in spans if span.failed]


def model_of(spans: list[Received]) -> str:
    """Return the model that the engine was asked for."""
    (engine,) = (span for span in spans if "gen_ai.request.model" in span.attributes)
    model: str = engine.attributes["gen_ai.request.model"]
    return model


def test_a_plain_call_and_whoever_looks_at_it_later(site: Site) -> None:
    """Without a context of the client's the gateway begins a trace. Later calls have their own, and point at it."""
    answer = site.post("/v1/chat/completions", site.chat(), traceparent="00-nonsense").json()
    trace = site.trace_of(answer["id"])
    spans = site.whole(trace)
    assert one(spans, "POST /v1/chat/completions").parent == ""
    shown = requests.get(f"{site.gateway.url}/v1/tasks/{answer['id']}", headers=site.headers, timeout=SOON_S)
    assert shown.status_code == 200
    (look,) = site.collector.wait(lambda seen: [s for s in seen if s.links == [trace]])
    assert (look.name, look.attributes["metaqore.request.id"]) == ("GET /v1/tasks/<request_id>", answer["id"])
    assert look.trace != trace


def test_tasks_on_a_socket(site: Site) -> None:
    """Each has a trace of its own, which points at the socket's: that one may last for days."""
    port = int(site.gateway.url.rpartition(":")[2])
    ids: list[str] = []
    with WebSocketClient(port, "/v1/stream", site.headers) as socket:
        for ref in ("one", "two"):
            task = {"agent": "incident-responder", "directive": CANARY, "sampling": {"max_tokens": 4}}
            socket.send({"op": "submit", "ref": ref, "task": task})
        while len(ids) < 2:
            if (said := socket.receive()).get("op") == "accepted":
                ids.append(said["id"])
    (server,) = site.collector.wait(named("GET /v1/stream"))
    assert server.attributes["http.response.status_code"] == 101
    traces = set()
    for request_id in ids:
        (task_span,) = site.collector.wait(named("task on a socket", **{"request.id": request_id}))
        assert task_span.links == [server.trace]
        assert one(site.whole(task_span.trace), "publish gpu").parent == task_span.id
        traces.add(task_span.trace)
    assert len(traces - {server.trace}) == 2


def test_an_unsampled_trace(site: Site) -> None:
    """A client that does not sample is not recorded, by the worker neither."""
    unsampled = TRACE[::-1]
    site.post("/v1/chat/completions", site.chat(), traceparent=f"00-{unsampled}-{CALLER}-00")
    site.whole(site.trace_of(site.post("/v1/chat/completions", site.chat()).json()["id"]))
    assert site.collector.of(unsampled) == []


def test_a_refusal(site: Site) -> None:
    """A veto is told by its code, and is no failure of the gateway's."""
    body = {
        "agent": "incident-responder",
        "directive": CANARY,
        "provider_hint": "openrouter",
        "has_sensitive_data": True,
    }
    refused = site.post("/v1/tasks", body)
    trace = site.trace_of(refused.json()["request_id"])
    server = one(site.collector.of(trace), "POST /v1/tasks")
    assert server.attributes["metaqore.error.code"] == "policy_veto"
    assert server.attributes["http.response.status_code"] == refused.status_code
    assert not server.failed
    assert one(site.collector.of(trace), "governance").attributes["error.type"] == "policy_veto"


def test_a_path_that_is_none(site: Site) -> None:
    """What a client writes into a path or a method goes nowhere."""
    requests.request("BREW", f"{site.gateway.url}/{CANARY}?{CANARY}", headers=site.headers, timeout=SOON_S)
    site.collector.wait(named("_OTHER"))


def test_a_cancelled_request(site: Site) -> None:
    """The attempt says that it was cancelled, which is no failure."""
    request_id = site.submit(sampling={"max_tokens": 60})
    wait_until(lambda: state_of(site, request_id) == "running", SOON_S, "a running request")
    requests.delete(f"{site.gateway.url}/v1/tasks/{request_id}", headers=site.headers, timeout=SOON_S)
    trace = site.trace_of(request_id)
    (attempt,) = site.collector.wait(named("process gpu", outcome="cancelled"), trace)
    assert not attempt.failed


def test_a_request_that_dies(site: Site) -> None:
    """Each of its attempts tells what became of it, and why."""
    trace = site.trace_of(site.submit(sampling={"max_tokens": 4, "seed": 666}))
    site.collector.wait(named("process gpu", outcome="dead"), trace)
    attempts = sorted(named("process gpu")(site.collector.of(trace)), key=lambda span: span.began)
    told = [(span.attributes["metaqore.attempt"], span.attributes["metaqore.outcome"]) for span in attempts]
    assert told == [(1, "queued"), (2, "queued"), (3, "dead")]
    engines = [span for span in site.collector.of(trace) if span.name.startswith("chat ")]
    assert {span.parent for span in engines} == {span.id for span in attempts}
    for span in (*attempts, *engines):
        assert (span.failed, span.attributes["error.type"]) == (True, "engine_failed")


def test_a_worker_that_is_killed(site: Site) -> None:
    """Both attempts are in the one trace: whoever begins the second tells of the first."""
    request_id = site.submit(sampling={"max_tokens": 60})
    wait_until(lambda: state_of(site, request_id) == "running", SOON_S, "a running request")
    site.worker.kill()
    site.worker.start()
    spans = site.whole(site.trace_of(request_id))
    lost, second = named("process gpu", attempt=1)(spans), one(spans, "process gpu", attempt=2)
    assert [(span.failed, span.attributes["error.type"]) for span in lost] == [(True, "worker_lost")]
    assert lost[0].parent == second.parent == one(spans, "publish gpu").id
    assert lost[0].began < second.began
    assert lost[0].attributes["metaqore.worker"] == second.attributes["metaqore.worker"]


def test_redis_loses_everything(site: Site) -> None:
    """What the housekeeper publishes again is in the same trace, under the call that sent it."""
    site.worker.stop()
    request_id = site.submit()
    with redis.Redis.from_url(site.environment["REDIS_URL"]) as client:
        client.flushall()
    site.worker.start()
    spans = site.whole(site.trace_of(request_id))
    again = one(spans, "publish gpu", epoch=2)
    assert (again.service, again.parent) == ("metaqore-housekeeper", one(spans, "POST /v1/tasks").id)
    assert one(spans, "process gpu").parent == again.id


def test_nothing_of_what_was_said(site: Site) -> None:
    """No prompt, no answer and no path is in what the collector got, in whatever form."""
    answer = site.post("/v1/chat/completions", site.chat(max_tokens=30)).json()
    site.whole(site.trace_of(answer["id"]))
    words = answer["choices"][0]["message"]["content"].split()
    everything = b"\n".join(site.collector.bodies)
    assert b"metaqore.organization" in everything
    for text in (CANARY, " ".join(words[:3]), "openrouter", site.headers["Authorization"].split()[1]):
        assert text.encode() not in everything, text


def state_of(site: Site, request_id: str) -> str:
    """Return the request's state."""
    shown = requests.get(f"{site.gateway.url}/v1/tasks/{request_id}", headers=site.headers, timeout=SOON_S)
    state: str = shown.json()["status"]
    return state
