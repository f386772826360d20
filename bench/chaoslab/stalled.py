"""A thousand clients open a stream and then read nothing of it.

A stalled client's socket takes a few kilobytes, then no more: it announces a tiny window and small segments, so that the
kernel cannot swallow the whole answer on its behalf, and answers carry many alternatives per token to be long. The
kernel's table of connections shows that the gateway has bytes for them that they do not take. Meanwhile the worker must
not wait for anybody: answers take as long as without such clients, an honest client beside them reads its text to
the end, and the gateway's memory stays within a bound.
"""

from __future__ import annotations

import resource
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from bench.chaoslab.asking import AGENT
from bench.chaoslab.calm import ask_calmly, questions
from bench.chaoslab.clients import Crowd
from bench.chaoslab.judge import judge
from bench.chaoslab.lab import Lab, Outcome
from bench.chaoslab.memory import Memory
from bench.chaoslab.record import Record, read
from bench.chaoslab.site import Plan, Site

CLIENTS = 1_000
TOKENS_PER_S, TOKENS = 40.0, 160
ALTERNATIVES = 20
TASKS = 4
PLAN = Plan(slots=32, engine={"tokens_per_s_per_sequence": TOKENS_PER_S})
#: Of the gateway, for each stalled client: its frames' buffer and its part of everything else.
KIB_A_CLIENT = 256
#: What else comes and goes in a gateway meanwhile, such as the threads that take a thousand connections.
SLACK_MIB = 64
SMALL_SEGMENT = 536
END_S = 120.0
_UNSENT = Path("/proc/net/tcp")


def run(lab: Lab) -> Outcome:
    """Run it."""
    rng = lab.rng("stalled")
    number = lab.count(CLIENTS, least=20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    with Site(lab.folder, lab.model, PLAN, lab.say) as site:
        calm = ask_calmly(site, questions(rng, 4, (TOKENS, TOKENS)), lab.seed)
        memory = Memory(site.gateways)
        idle_mib = memory.look()
        alone = list(read(site.database_url).rows)
        watched = _submit(site)
        stalled = [_stall(site, watched[index % len(watched)]) for index in range(number)]
        try:
            with Crowd(site.urls, site.key, list(calm), seed=lab.seed) as crowd:
                site.progress = crowd.progress
                most_unsent = 0
                while not crowd.done:
                    memory.look()
                    most_unsent = max(most_unsent, _with_unsent_bytes(site))
                    site.wait(0.5)
            _wait_for_end(site, watched)
            most_unsent = max(most_unsent, _with_unsent_bytes(site))
            held_mib = memory.peak(0.0, time.time()) - idle_mib
        finally:
            for one in stalled:
                one.close()
        record = read(site.database_url)
    verdict = judge(record, crowd.told, calm)
    slowest, usual = (max(_ran_s(record, request_id) for request_id in ids) for ids in (watched, alone))
    figures = {
        "stalled_clients": float(number),
        "stalled_share": most_unsent / number,
        "answer_alone_s": usual,
        "answer_stalled_s": slowest,
        "answer_stalled_to_alone": slowest / usual,
        "gateway_grew_mib": held_mib,
        **verdict.broken,
    }
    targets = {
        **verdict.targets(),
        # A client whose bytes the kernel took for it would show nothing.
        "stalled_share": (">=", 0.9),
        "answer_stalled_to_alone": ("<=", 1.5),
        "gateway_grew_mib": ("<=", SLACK_MIB + number * KIB_A_CLIENT / 1024),
    }
    return Outcome(figures, targets, verdict.examples, timed=["answer_stalled_to_alone"])


def _submit(site: Site) -> list[str]:
    """Submit the tasks that stalled clients watch; return their ids."""
    sampling = {"max_tokens": TOKENS, "seed": 1, "logprobs": ALTERNATIVES}
    ids = []
    for index in range(TASKS):
        body = {"agent": AGENT, "directive": f"Watched {index}", "sampling": sampling}
        answer = requests.post(f"{site.urls[0]}/v1/tasks", json=body, headers=_headers(site), timeout=30)
        answer.raise_for_status()
        ids.append(str(answer.json()["id"]))
    return ids


def _stall(site: Site, request_id: str) -> socket.socket:
    """Ask for a stream as a client that will not read: the kernel holds as little for it as it can be told to."""
    address = urlsplit(site.urls[0])
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT)
    client.connect((address.hostname, address.port))
    lines = [f"GET /v1/tasks/{request_id}/events HTTP/1.1", "Host: gateway"]
    lines += [f"{name}: {value}" for name, value in _headers(site).items()]
    client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    return client


def _headers(site: Site) -> dict[str, str]:
    return {"Authorization": f"Bearer {site.key}"}


def _wait_for_end(site: Site, ids: list[str]) -> None:
    def ended() -> bool:
        urls = [f"{site.urls[0]}/v1/tasks/{request_id}" for request_id in ids]
        states = [requests.get(url, headers=_headers(site), timeout=30).json()["status"] for url in urls]
        return all(state == "completed" for state in states)

    site.until(ended, END_S, "the end of the watched tasks")


def _with_unsent_bytes(site: Site) -> int:
    """Return how many connections of the gateway hold bytes that their client does not take, as the kernel sees it."""
    port = f":{urlsplit(site.urls[0]).port:04X}"
    rows = [line.split() for line in _UNSENT.read_text("ascii").splitlines()[1:]]
    return sum(row[1].endswith(port) and int(row[4].split(":")[0], 16) > 0 for row in rows)


def _ran_s(record: Record, request_id: str) -> float:
    at: dict[str, Any] = {event.kind: event.at for event in record.events[request_id]}
    return float(at["completed"] - at["started"])
