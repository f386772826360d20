"""What tracing costs a request: off, on but not sampled, and on with every span sent to a collector.

One process makes the spans that gateway and worker make of a request, with the calls and attributes that they use, so that the
figures are the sum over all processes. They are milliseconds of the processor's time; of what is on, `made` is without,
and `sent` with the thread that encodes and sends. The collector is a process of its own, which takes everything and
keeps nothing, and does not count. Each figure is the median of `--rounds`; there is nothing random.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import IO, cast

from bench.report import arguments, finish
from tasks import tracing
from tasks.settings import TracingGroup
from tasks.tracing.messaging import PROCESS, PUBLISH, processing, publishing

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0"
COLLECTOR = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *arguments): pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
ID, TAG, FLUSH_S = "gw_01a21688098e708dbba6817b6da8d86d", "gw_01a21688098e708dbba6817b6da8d86d:1", 60.0


def request(sampled: bool) -> None:
    """Make the ten spans of one plain call, answered at the first attempt."""
    http = {"http.request.method": "POST", "url.scheme": "http", "http.route": "/v1/chat/completions"}
    with tracing.begin("POST /v1/chat/completions", "server", f"{CALLER}{int(sampled)}", http) as server:
        with tracing.span("governance") as step:
            step.set({"metaqore.sensitivity": "public"})
        with tracing.span("assemble prompt") as step:
            step.set({"metaqore.prompt_tokens": 667})
        with tracing.span("commit"):
            pass
        with tracing.span(PUBLISH, publishing(TAG), "producer"):
            context = tracing.current().context
        server.set({"metaqore.request.id": ID, "metaqore.organization": "acme", "http.response.status_code": 200})
    with tracing.begin(PROCESS, "consumer", context) as attempt:
        attempt.set(
            {**processing(TAG), "metaqore.request.id": ID, "metaqore.organization": "acme", "metaqore.epoch": 1}
        )
        with tracing.span("commit"):
            pass
        attempt.set({"metaqore.attempt": 1, "metaqore.worker": "gpu@host", "metaqore.queue.wait_ms": 1.5})
        asked = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "vllm", "gen_ai.request.model": "model"}
        asked |= {"gen_ai.request.max_tokens": 256, "gen_ai.request.temperature": 0.7, "gen_ai.request.top_p": 1.0}
        with tracing.span("chat model", asked) as engine:
            engine.set({"gen_ai.usage.input_tokens": 667, "gen_ai.usage.output_tokens": 40})
            engine.set({"gen_ai.response.model": "model", "gen_ai.response.finish_reasons": ["stop"]})
            engine.event("first token")
        with tracing.span("commit"):
            pass
        with tracing.span("last frame"):
            pass
        attempt.set({"metaqore.outcome": "completed"})


def costs(count: int, *, on: bool, sampled: bool) -> tuple[float, float]:
    """Return the milliseconds a request takes until its spans are made, and until they are sent."""
    stop = tracing.start(TracingGroup(enabled=on, flush_s=FLUSH_S), "bench")
    began = time.process_time()
    for _ in range(count):
        request(sampled)
    made = time.process_time()
    stop()
    return 1000 * (made - began) / count, 1000 * (time.process_time() - began) / count


def main() -> None:
    """Measure, and tell."""
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="a round; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args()
    command = [sys.executable, "-c", COLLECTOR]
    collector = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603  our own text, above
    try:
        port = cast("IO[str]", collector.stdout).readline().strip()
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{port}"
        # Room for all spans of a round: none may be dropped, which would cost nothing.
        os.environ["OTEL_BSP_MAX_QUEUE_SIZE"] = str(20 * options.requests)
        rounds = range(options.rounds)
        off = [costs(options.requests, on=False, sampled=True)[0] for _ in rounds]
        unsampled = [costs(options.requests, on=True, sampled=False)[1] for _ in rounds]
        made, sent = zip(*(costs(options.requests, on=True, sampled=True) for _ in rounds), strict=True)
    finally:
        collector.kill()
        collector.wait()
    figures = {"off_ms": off, "unsampled_ms": unsampled, "made_ms": made, "sent_ms": sent}
    finish(
        "tracing",
        options,
        {name: statistics.median(values) for name, values in figures.items()},
        {"off_ms": ("<=", 0.02), "unsampled_ms": ("<=", 0.1)},
    )


if __name__ == "__main__":
    main()
