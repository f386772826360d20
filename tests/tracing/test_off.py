"""Off, which is the default, no process of the product imports what records traces, or sends them.

redis-py imports OpenTelemetry's interface for metrics by itself wherever that is installed, so it is in every process here.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests

from tests.conftest import new_key
from tests.fleet import READY_S, Gateway, own_services
from tests.services import wait_until
from tests.workers import Worker

SOON_S = 60.0
RECORDING = ("tasks.tracing.recorder", "opentelemetry.sdk.trace", "opentelemetry.exporter", "opentelemetry.proto")


def test_nothing_is_imported(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway and a worker tell what they import, from their start to the end of a traced client's call."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    with ExitStack() as stack:
        environment = stack.enter_context(own_services(tmp_path, tiny_model))
        key = new_key("acme")
        worker = Worker(tmp_path / "worker.log")
        stack.callback(worker.stop)
        worker.start()
        gateway = Gateway(tmp_path / "gateway.log", os.environ | environment)
        stack.callback(gateway.kill)
        wait_until(gateway.ready, READY_S, "a ready gateway")
        answer = requests.post(
            f"{gateway.url}/v1/chat/completions",
            json={"model": "incident-responder", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
            headers={
                "Authorization": f"Bearer {key}",
                "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            },
            timeout=SOON_S,
        )
        assert answer.status_code == 200, answer.text
    for name in ("gateway", "worker"):
        lines = (tmp_path / f"{name}.log").read_text().splitlines()
        imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
        assert "tasks.tracing" in imported, name
        assert not [module for module in imported if module.startswith(RECORDING)], name
