"""Schemathesis reads the OpenAPI document and tries to prove the gateway wrong.

Requests made from the document must be accepted, and those that break it refused; every answer must be one that is
described; keys must matter; what was made must be there. `schemathesis.toml` and tests/fuzzing.py tell it what the
document cannot. CONTRIBUTING.md says how to let it try for longer.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from schemathesis.engine import events, from_schema

from gateway_app.openapi.document import OPERATIONS
from tests.measuring import unmeasured
from tests.serving import Served, standing
from tests.workers import ROOT

#: Cases of each operation, made at random; before them, each rule of the document is tried once.
EXAMPLES = 3
#: Sequences of operations that lead from one to the other.
SEQUENCES = 12
#: The parts of the API, by their paths; those of the first lead nowhere.
ALONE = ("/(?!v1/)", "/v1/(audit|cache|chat|policy|stream)")
LINKING = ("/v1/tasks", "/v1/responses", "/v1/models", "/v1/profiles", "/v1/(files|batches)")
#: Of these no case succeeds: plain HTTP opens no socket, what is to be cancelled has ended before, and the document was
#: read before the test.
WITHOUT_SUCCESS = {
    *("cancelTask", "cancelResponse", "cancelBatch", "getDocument"),
    *(operation.name for operation in OPERATIONS if operation.websocket),
}
#: Operations to which the answers of others lead.
LINKED = {
    link.operation for operation in OPERATIONS for reply in operation.replies.values() for link in reply.links
} - WITHOUT_SUCCESS


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    """Return a gateway with a worker whose answers take no time, so that every stream ends soon.

    Coverage does not measure it: most of the time goes into Schemathesis, and other tests run what it runs.
    """
    interval = sys.getswitchinterval()
    # Client and server are threads of this process, and each waits for the other all the time.
    sys.setswitchinterval(0.0005)
    try:
        with (
            unmeasured(),
            standing(tmp_path_factory.mktemp("gateway"), tiny_model, ENGINE__OPTIONS='{"time_scale": 0}') as made,
        ):
            yield made
    finally:
        sys.setswitchinterval(interval)


def test_all_parts_are_tried() -> None:
    """Each operation belongs to one part."""
    for operation in OPERATIONS:
        assert sum(bool(re.match(part, operation.path)) for part in (*ALONE, *LINKING)) == 1, operation.path


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", [*ALONE, *LINKING])
def test_each_operation(served: Served, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """No check fails on the examples, on what tries each rule of the document once, or on cases made at random."""
    monkeypatch.chdir(ROOT)
    successes = attempt(served, ["examples", "coverage", "fuzzing"], EXAMPLES, part)
    # The others want something that there is.
    creators = {each.name for each in OPERATIONS if re.match(part, each.path) and "{" not in each.path}
    assert successes >= creators - WITHOUT_SUCCESS - {"createBatch"}


@pytest.mark.parametrize("part", LINKING)
def test_sequences(served: Served, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """No check fails where one operation follows another, and what the one made is found by the other."""
    monkeypatch.chdir(ROOT)
    linked = {each.name for each in OPERATIONS if re.match(part, each.path)} & LINKED
    # Which sequences are tried depends on the answers, so not every link is followed every time.
    assert len(attempt(served, ["stateful"], SEQUENCES, part) & linked) * 3 >= len(linked) > 0


def attempt(served: Served, phases: list[str], examples: int, part: str) -> set[str]:
    """Run phases of Schemathesis; fail if a check does; return the operations that succeeded at least once."""
    config = schemathesis.Config.from_path("schemathesis.toml")
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json", config=config).include(path_regex=f"^{part}")
    schema.config.headers = served.headers
    schema.config.phases.update(phases=phases)
    schema.config.generation.update(max_examples=examples, deterministic=True)
    failures: list[str] = []
    statuses: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            failures += failed(event.recorder)
            for name, status in answered(event.recorder):
                statuses[name][status] += 1
        elif isinstance(event, events.NonFatalError):
            failures.append(f"{event.label}: {event.info.title}: {event.info.message}")
        elif isinstance(event, events.FatalError):
            raise event.exception
    assert failures == []
    return {name for name, found in statuses.items() if any(200 <= status < 300 for status in found)}


def answered(recorder: Any) -> Iterator[tuple[str, int]]:
    """Yield the operation and the status of each answer to a method that the document has."""
    for case_id, sent in recorder.interactions.items():
        operation = recorder.cases[case_id].value.operation
        if sent.response is not None and sent.request.method == operation.method.upper():
            yield operation.definition.raw["operationId"], sent.response.status_code


def failed(recorder: Any) -> Iterator[str]:
    """Yield what each failed check says, with the request and the answer it is about."""
    for case_id, checks in recorder.checks.items():
        for check in checks:
            if check.failure_info is not None:
                sent = recorder.interactions[case_id]
                request, answer = sent.request, sent.response
                yield (
                    f"{check.name}: {check.failure_info.failure}\n{request.method} {request.uri} {request.headers} "
                    f"{request.body!r}\n{answer and (answer.status_code, answer.content)}"
                )
