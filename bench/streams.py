"""Many streams through one gateway process: how late tokens come, and what they cost.

A whole local gateway (Redis, one gunicorn process, one worker with the simulated engine) serves streamed chat
completions of 20 tokens a second each. The simulated engine gives each token at a known time, so a token's lateness
is how long after its time it arrives, counted from the most punctual token of its stream. All figures are of the time
in which every stream runs.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import resource
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import psutil
import redis

from bench.report import arguments, finish
from tests.local_gateway import LocalGateway
from tests.tiny_model import make_tiny_model

AGENT = "incident-responder"
CONNECT_RATE = 60.0
#: What taking in the last requests still costs must not count as streaming.
SETTLE_S = 2.0
CONTENT = b'"content":"'


def main() -> None:
    """Run it."""
    parser = arguments(__doc__)
    parser.add_argument("--streams", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=20.0, help="tokens/s of each stream; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=20.0, help="with all streams running; default: %(default)s")
    options = parser.parse_args()
    started_within_s = options.streams / CONNECT_RATE * 2 + 5
    tokens = int(options.rate * (started_within_s + options.seconds + SETTLE_S + 10))
    engine = {
        "tokens_per_s_per_sequence": options.rate,
        "answer_tokens": tokens,
        "max_num_seqs": options.streams + 8,
        "max_model_len": 65_536,
        "num_blocks": 1_000_000,
    }
    with tempfile.TemporaryDirectory() as folder:
        gateway = LocalGateway(Path(folder) / "gateway", make_tiny_model(Path(folder) / "model"))
        try:
            gateway.start_ready(
                METAQORE_ENGINE__OPTIONS=json.dumps(engine),
                METAQORE_ENGINE__MAX_NUM_SEQS=str(options.streams + 8),
                METAQORE_ENGINE__MAX_MODEL_LEN="65536",
                METAQORE_SCHEDULING__LEASE_S="60",
            )
            finish(
                "streams",
                options,
                measure(gateway, options, tokens, started_within_s),
                {
                    "lateness_max_ms": ("<=", 250.0),
                    "streams_complete": (">=", float(options.streams)),
                    "redis_connections_added": ("<=", 16.0),
                },
            )
        finally:
            gateway.kill_everything()


def measure(gateway: LocalGateway, options: Any, tokens: int, started_within_s: float) -> dict[str, float]:
    """Drive the streams from a process of its own, and watch the others meanwhile."""
    key = gateway.folder.api_key.read_text().strip()
    port = int((gateway.folder.run / "gateway.port").read_text())
    web = max(psutil.Process(gateway.child("web").pid).children(), key=lambda child: child.memory_info().rss)  # type: ignore[union-attr]
    variables = dict(line.split("=", 1) for line in (gateway.folder.run / "env").read_text().splitlines())
    client = redis.Redis.from_url(variables["REDIS_URL"].strip("'"))
    processes = {name: child for name in ("web", "worker", "redis") if (child := gateway.child(name)) is not None}
    family = {name: [process, *process.children(recursive=True)] for name, process in processes.items()}
    before = len(cast("list[Any]", client.client_list()))
    rss_before = web.memory_info().rss
    receiver, sender = multiprocessing.Pipe(duplex=False)
    driver = multiprocessing.Process(
        target=drive, args=(sender, port, key, options, tokens, started_within_s), daemon=True
    )
    driver.start()
    receiver.recv()
    began, used = time.monotonic(), {name: _cpu_s(members) for name, members in family.items()}
    connections = len(cast("list[Any]", client.client_list()))
    time.sleep(options.seconds)
    elapsed = time.monotonic() - began
    spent = {name: _cpu_s(members) - used[name] for name, members in family.items()}
    rss = web.memory_info().rss
    figures: dict[str, float] = receiver.recv()
    driver.join()
    return {
        "streams": float(options.streams),
        **figures,
        "redis_connections_added": float(connections - before),
        "gateway_memory_mb": rss / 1e6,
        "gateway_memory_idle_mb": rss_before / 1e6,
        **{f"cpu_{name}_cores": seconds / elapsed for name, seconds in spent.items()},
    }


def drive(sender: Any, port: int, key: str, options: Any, tokens: int, started_within_s: float) -> None:
    """Open the streams and note when each token comes; report when all run, and at the end."""
    # Its notes are many small objects that all stay; looking through them for garbage would make it late, not the gateway.
    gc.disable()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sender.send(asyncio.run(_drive(sender, port, key, options, tokens, started_within_s)))


async def _drive(
    sender: Any, port: int, key: str, options: Any, tokens: int, started_within_s: float
) -> dict[str, float]:
    arrivals: list[list[tuple[float, int]]] = [[] for _ in range(options.streams)]
    running = asyncio.Semaphore(0)
    tasks = []
    began = time.monotonic()
    for index in range(options.streams):
        tasks.append(asyncio.create_task(_stream(port, key, tokens, index, arrivals[index], running)))
        await asyncio.sleep(max(0.0, began + (index + 1) / CONNECT_RATE - time.monotonic()))
    try:
        for _ in range(options.streams):
            await asyncio.wait_for(running.acquire(), started_within_s)
    except TimeoutError:
        failed = [str(task.exception()) for task in tasks if task.done()]
        silent = sum(not stream for stream in arrivals)
        raise RuntimeError(f"{silent} streams said nothing; {len(failed)} failed: {failed[:3]}") from None
    started_s = time.monotonic() - began
    await asyncio.sleep(SETTLE_S)
    sender.send("all run")
    since = time.monotonic()
    await asyncio.sleep(options.seconds)
    until = time.monotonic()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    late: list[float] = []
    gaps: list[float] = []
    whole = 0
    for stream in arrivals:
        window = [(at, count) for at, count in stream if since <= at <= until]
        if not window:
            continue
        # `count` tokens had come by `at`: the last of them was due count / rate after the stream's start.
        offsets = [at - count / options.rate for at, count in window]
        late += [offset - min(offsets) for offset in offsets]
        gaps += [after - before for (before, _), (after, _) in pairwise(window)]
        expected = (until - since) * options.rate
        whole += window[-1][1] - window[0][1] >= 0.95 * expected - options.rate / 2
    late.sort()
    gaps.sort()
    return {
        "all_running_after_s": started_s,
        "streams_complete": float(whole),
        "frames_per_s": len(late) / options.seconds,
        "lateness_p50_ms": late[len(late) // 2] * 1000,
        "lateness_p99_ms": late[int(len(late) * 0.99)] * 1000,
        "lateness_max_ms": late[-1] * 1000,
        "gap_p50_ms": gaps[len(gaps) // 2] * 1000,
        "gap_max_ms": gaps[-1] * 1000,
    }


class _Client(asyncio.Protocol):
    """Asks for one stream and notes when how many tokens have come, at as little cost as it can: words are counted.

    A token of the simulated engine is a word and a space.
    """

    def __init__(self, body: bytes, arrivals: list[tuple[float, int]], running: asyncio.Semaphore) -> None:
        self._body = body
        self._arrivals = arrivals
        self._running = running
        self._rest = b""
        self._count = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        cast("asyncio.Transport", transport).write(self._body)

    def data_received(self, data: bytes) -> None:
        """Count what is in the contents that are complete."""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        if not self._arrivals and b"HTTP/1.1 " in (head := b"".join(events)) and b"HTTP/1.1 200 " not in head:
            self._fail(head[:40])
            return
        before = self._count
        for event in events:
            _, found, content = event.partition(CONTENT)
            if found:
                self._count += content[: content.index(b'"')].count(b" ")
        if self._count > before:
            if not self._arrivals:
                self._running.release()
            self._arrivals.append((time.monotonic(), self._count))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  the end is what counts
        """Note the end."""
        self._fail(b"closed")

    def _fail(self, why: bytes) -> None:
        if not self.ended.done():
            self.ended.set_exception(RuntimeError(f"{self._count} tokens, then {why!r}"))


async def _stream(
    port: int, key: str, tokens: int, index: int, arrivals: list[tuple[float, int]], running: asyncio.Semaphore
) -> None:
    body = json.dumps(
        {
            "model": AGENT,
            "messages": [{"role": "user", "content": f"Stream {index}"}],
            "max_tokens": tokens,
            "stream": True,
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    transport, client = await asyncio.get_running_loop().create_connection(
        lambda: _Client(head + body, arrivals, running), "127.0.0.1", port
    )
    try:
        await client.ended
    finally:
        transport.close()


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes if process.is_running())


if __name__ == "__main__":
    main()
