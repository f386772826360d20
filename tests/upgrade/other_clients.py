"""Clients beside those that read native streams: plain calls, responses in the background, and one batch."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import requests

AGENT = "incident-responder"
PATIENCE_S = 60.0
#: What a client thinks between two calls, so that the load leaves processors to the processes that start.
REST_S = 0.2
LINES = 12


class Caller(threading.Thread):
    """Asks one thing after the other, plain or in the background, and waits for each answer.

    What it did not get is in `faults`; every answer other than 200 that it was given is counted in `statuses`.
    """

    def __init__(self, urls: Sequence[str], key: str, *, background: bool) -> None:
        super().__init__(daemon=True)
        self.answered = 0
        self.faults: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.texts: set[str] = set()
        self.enough = threading.Event()
        self._urls = urls
        self._background = background
        self._headers = {"Authorization": f"Bearer {key}"}

    def run(self) -> None:
        """Ask until it is told that it is enough."""
        while not self.enough.is_set():
            text = self._in_background() if self._background else self._plain()
            if text is None:
                return
            self.texts.add(text)
            self.answered += 1
            self.enough.wait(REST_S)

    def call(self, method: str, path: str, **options: Any) -> Any:
        """Return what a gateway answers, asking again where one goes away. A call that may be repeated has its key."""
        headers = {**self._headers, "Idempotency-Key": secrets.token_hex(16)} if method == "POST" else self._headers
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                answer = requests.request(method, f"{self._urls[0]}{path}", headers=headers, timeout=30, **options)
            except requests.RequestException:
                time.sleep(0.05)
                continue
            if answer.ok:
                return answer.json() if "json" in answer.headers["Content-Type"] else answer.text
            self.statuses[answer.status_code] += 1
            if answer.status_code != 503:
                break
            time.sleep(0.05)
        self.faults.append(f"{method} {path.partition('/gw_')[0]} was not answered; {dict(self.statuses)}")
        return None

    def _plain(self) -> str | None:
        message = {"role": "user", "content": "What first?"}
        body = {"model": AGENT, "messages": [message], "max_tokens": 8, "seed": 3}
        answer = self.call("POST", "/v1/chat/completions", json=body)
        return answer and str(answer["choices"][0]["message"]["content"])

    def _in_background(self) -> str | None:
        body = {"model": AGENT, "input": "What first?", "max_output_tokens": 16, "background": True, "seed": 3}
        answer = self.call("POST", "/v1/responses", json=body)
        deadline = time.monotonic() + PATIENCE_S
        while answer and answer["status"] in ("queued", "in_progress") and time.monotonic() < deadline:
            time.sleep(0.05)
            answer = self.call("GET", f"/v1/responses/{answer['id']}")
        if answer is None:
            return None
        if answer["status"] not in ("completed", "incomplete"):
            self.faults.append(f"a response is {answer['status']}")
            return None
        return str(answer["output"][0]["content"][0]["text"])


def begin_batch(caller: Caller) -> str:
    """Have a batch begun; return its id."""
    body = {"model": AGENT, "messages": [{"role": "user", "content": "What first?"}], "max_tokens": 8}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    content = "\n".join(json.dumps({"custom_id": str(number), **line}) for number in range(LINES))
    file = caller.call(
        "POST", "/v1/files", files={"file": ("lines.jsonl", content.encode())}, data={"purpose": "batch"}
    )
    wanted = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return str(caller.call("POST", "/v1/batches", json=wanted)["id"])


def batch_answers(caller: Caller, batch_id: str) -> list[int]:
    """Wait for the end of a batch; return the statuses of its answers, in the order of its lines."""
    deadline = time.monotonic() + PATIENCE_S
    while (batch := caller.call("GET", f"/v1/batches/{batch_id}"))["status"] != "completed":
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
    answers = caller.call("GET", f"/v1/files/{batch['output_file_id']}/content")
    lines = answers if isinstance(answers, str) else json.dumps(answers)
    return [json.loads(line)["response"]["status_code"] for line in lines.splitlines()]
