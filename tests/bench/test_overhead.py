"""The overhead benchmark asks, checks and counts as it says: in small, with ours alone, and against servers that err."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from bench.overheadlab import installing
from bench.overheadlab.client import Cell, Client
from bench.overheadlab.engine_cost import engine_ms
from bench.overheadlab.rounds import Load, Rounds
from bench.overheadlab.system import System
from bench.overheadlab.upstream import MODEL, PACED_MODEL, TEXT, Upstream
from bench.overheadlab.usage import cpu_s
from bench.overheadlab.wire import Reply, WrongAnswer, post, read
from tests.workers import ROOT

GAP_S = 0.03
PLAIN, STREAM = Load("plain", stream=False, clients=2), Load("stream", stream=True, clients=2)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Return the process that asks."""
    with Client() as running:
        yield running


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    """Return the model that takes no time."""
    with Upstream(GAP_S) as running:
        yield running


def rounds_of(client: Client, requests: int = 8) -> Rounds:
    """Return rounds that have not begun."""
    return Rounds(client, requests, seconds=30.0, seed=1)


def system_at(port: int, model: str = MODEL, answer: str = TEXT) -> System:
    """Return a system that is this process, asked at a port."""
    return System("test", port, model, {"test": [psutil.Process()]}, answer=answer)


def test_all_requests_are_answered_and_checked(client: Client, upstream: Upstream) -> None:
    """Each answer has an id of its own, the model's words, and in a stream a chunk a word."""
    rounds = rounds_of(client)
    plain = rounds.keep(system_at(upstream.port), PLAIN)
    stream = rounds.keep(system_at(upstream.port), STREAM)
    assert rounds.errors == []
    assert rounds.answered == {"test": 16}
    assert plain is not None
    assert stream is not None
    assert (plain.requests, plain.chunks, stream.chunks) == (8, 1.0, 20.0)
    assert 0 < plain.p50_ms <= plain.p99_ms


def test_words_of_a_paced_stream_come_one_by_one(client: Client, upstream: Upstream) -> None:
    """Its first words come long before its last."""
    sample = rounds_of(client, 2).cell(system_at(upstream.port, PACED_MODEL), STREAM)
    assert sample is not None
    assert sample.p50_ms >= 19 * GAP_S * 1000
    assert sample.first_ms < sample.p50_ms / 2


def test_an_open_loop_does_not_wait_for_answers(client: Client, upstream: Upstream) -> None:
    """Ten streams of 0.6 s each begin within a second although nobody had more than one connection."""
    load = Load("open", stream=True, clients=1, rate=20.0)
    rounds = rounds_of(client, 10)
    sample = rounds.cell(system_at(upstream.port, PACED_MODEL), load)
    assert sample is not None
    assert (rounds.errors, sample.requests) == ([], 10)
    assert sample.requests / sample.per_s < 10 * 20 * GAP_S / 2


def test_wrong_answers_are_errors(client: Client, upstream: Upstream) -> None:
    """Other words than were to come are told of, each time."""
    rounds = rounds_of(client)
    rounds.cell(system_at(upstream.port, answer="something else"), PLAIN)
    assert len(rounds.errors) == 8
    assert "word0" in rounds.errors[0]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 3\r\n\r\nbad", "500 Oh: bad"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "KeyError"),
        (b"", "closed without an answer"),
    ],
)
def test_a_server_that_errs_is_told_of(client: Client, answer: bytes, error: str) -> None:
    """What is no answer is an error, with what came instead, and the benchmark goes on."""
    rounds = rounds_of(client, 1)
    with serving(answer) as port:
        assert rounds.cell(system_at(port), Load("bad", stream=False, clients=1)) is None
    assert len(rounds.errors) == 1
    assert error in rounds.errors[0]


@contextmanager
def serving(answer: bytes) -> Iterator[int]:
    """Serve the same bytes to everybody, then close; return the port."""
    loop = asyncio.new_event_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.close()


def test_an_answer_is_complete_wherever_it_is_cut() -> None:
    """Whichever way its bytes are divided, an answer ends with its last byte and reads the same."""
    event = b'data: {"id":"1","choices":[{"delta":{"content":"a "},"finish_reason":"stop"}]}\n\n'
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (event, b"data: [DONE]\n\n")) + b"0\r\n\r\n"
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + body
    for cut in range(1, len(whole)):
        reply = Reply()
        assert not reply.add(whole[:cut])
        assert reply.add(whole[cut:])
        assert not reply.reusable
    assert read(bytes(reply.data), stream=True).text == "a "


def test_a_cut_stream_is_no_answer() -> None:
    """A stream without its end is refused, whatever its words."""
    event = b'data: {"id":"1","choices":[{"delta":{"content":"a "},"finish_reason":"stop"}]}\n\n'
    with pytest.raises(WrongAnswer):
        read(b"HTTP/1.1 200 OK\r\n\r\n" + event, stream=True)


def test_requests_that_no_time_is_left_for_are_not_begun(client: Client, upstream: Upstream) -> None:
    """A cell ends with its seconds, and says how many were answered."""
    request = post("x", "/v1/chat/completions", {}, {"model": PACED_MODEL, "stream": True})
    outcome = client.run(Cell(upstream.port, (request,) * 100, stream=True, clients=1, seconds=2 * GAP_S))
    assert len(outcome.said) == 1


def test_processor_time_of_descendants_counts_when_they_have_ended() -> None:
    """A grandchild's time is there while it runs, and stays there afterwards."""
    work = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}]); print('done', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert cpu_s({"child": [psutil.Process(process.pid)]})["child"] >= 0.3


def test_the_engine_alone_costs_something() -> None:
    """Its share is positive and far below a whole request's."""
    assert 0 < engine_ms(1) < 50


def test_what_is_not_to_be_had_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that cannot be installed is told of with the installer's last words, and is not taken for installed later."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such release >&2\nexit 1\n")
    python.chmod(0o700)
    monkeypatch.setattr(installing, "CACHE_HOME", tmp_path)
    monkeypatch.setattr(sys, "executable", str(python))
    for _ in range(2):
        with pytest.raises(installing.NotInstalled, match="no such release"):
            installing.python_package("something==1")


def test_ours_in_small(tmp_path: Path) -> None:
    """The whole benchmark, with few requests: every process counts, every answer is right, JSON holds what was printed."""
    result = tmp_path / "result.json"
    options = ["--systems", "ours", "--rounds", "1", "--requests", "12", "--seconds", "2", "--clients", "16"]
    options += ["--kinds", "plain", "stream"]
    command = [sys.executable, "-m", "bench.overhead", *options, "--json", str(result)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.exists(), done.stdout + done.stderr
    told = json.loads(result.read_text("utf-8"))
    figures = told["figures"]
    assert figures["errors"] == 0, done.stdout
    for load in ("plain 16", "stream 16", "plain half", "stream half"):
        of = f"ours {load}"
        parts = [figures[f"{of} cpu_ms {part}"] for part in ("gateway", "redis", "worker", "housekeeper")]
        assert figures[f"{of} cpu_ms"] == pytest.approx(sum(parts))
        assert 1 <= figures[f"{of} requests"] <= 12
    assert figures["ours plain 16 cpu_ms gateway"] > 0
    assert figures["ours plain 16 cpu_ms worker"] > 0
    assert "ours plain half added_p50_ms" in told["targets"]
    assert f"{figures['ours plain 16 per_s']:,.3f}" in done.stdout
