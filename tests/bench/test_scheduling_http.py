"""The side-by-side's own parts: engines behind HTTP, the client that asks at given moments, what is made of the answers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import requests

from bench.overheadlab.system import System
from bench.schedulinglab import http_figures, http_load
from bench.schedulinglab.fleet import Run
from bench.schedulinglab.http_client import ANSWER_S, Served, Target, play
from bench.schedulinglab.http_engine import MODEL, Engines, Words, engine_of
from bench.schedulinglab.http_load import Watch
from bench.schedulinglab.http_work import ANSWER_TOKENS, Texts, answer_tokens, gently
from bench.schedulinglab.scenarios import OPTIONS, Workload
from bench.schedulinglab.workload import Ask, profiles
from worker_gpu.engines.simulated_options import SimulationOptions

WORDS = [f"word{number}" for number in range(500)]
KNOWN = profiles(3, 320)


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    """Return two engines that take no time."""
    with Engines(2, SimulationOptions(time_scale=0, answer_tokens=100_000)) as running:
        yield running


def target_at(port: int) -> Target:
    """Return an engine as a system that is asked."""
    return Target(System("engine", port, MODEL, {}), by_agent=False, static_tokens=321)


def asks(*times: float) -> list[Ask]:
    """Return requests for the first profile at these times."""
    return [Ask(number, at, KNOWN[0], 20) for number, at in enumerate(times)]


def test_an_engine_answers_as_many_words_as_were_asked_for_and_tells_what_was_cached(engines: Engines) -> None:
    """The second request for a profile finds its blocks; answers say which engine gave them."""
    found = asyncio.run(play(asks(0.0, 0.2), [target_at(engines.ports[1])], Texts(WORDS), scale=1.0))["engine"]
    assert [served.error for served in found] == ["", ""]
    said = [served.said for served in found]
    assert [len(one.text.split()) for one in said if one] == [answer_tokens(served.ask) for served in found]
    # The role's name and 320 words fill 20 blocks; the user's role and 20 words are the request's own.
    assert [(one.prompt_tokens, one.cached_tokens) for one in said if one] == [(342, 0), (342, 320)]
    assert [engine_of(one.id) for one in said if one] == [1, 1]


def test_engines_have_caches_of_their_own(engines: Engines) -> None:
    """What one has computed, the other has not."""
    ask = [Ask(7, 0.0, KNOWN[1], 20)]
    cached = []
    for port in (engines.ports[0], engines.ports[0], engines.ports[1]):
        [served] = asyncio.run(play(ask, [target_at(port)], Texts(WORDS), scale=1.0))["engine"]
        assert served.said is not None
        cached.append(served.said.cached_tokens)
    # The last prompt token is always computed, and with it its block.
    assert cached == [0, 336, 0]


def test_an_engine_answers_what_routers_ask(engines: Engines) -> None:
    """Models, health, plain answers, and the token ids of messages: a word is a token, the same for the same word."""
    url = f"http://127.0.0.1:{engines.ports[0]}"
    assert requests.get(f"{url}/health", timeout=10).ok
    assert requests.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"] == MODEL
    body = {"messages": [{"role": "user", "content": "one two one"}], "max_completion_tokens": 4}
    rendered = requests.post(f"{url}/v1/chat/completions/render", json=body, timeout=10).json()["token_ids"]
    assert len(rendered) == 4
    assert rendered[1] == rendered[3] != rendered[2]
    plain = requests.post(f"{url}/v1/chat/completions", json=body, timeout=10).json()
    assert (plain["usage"]["completion_tokens"], plain["choices"][0]["finish_reason"]) == (4, "length")
    refused = requests.post(f"{url}/v1/chat/completions", json={**body, "messages": long_message()}, timeout=10)
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "prompt_too_long")
    endless = requests.post(f"{url}/v1/chat/completions", json={"messages": body["messages"]}, timeout=10)
    assert (endless.status_code, endless.json()["error"]["message"]) == (400, "'max_tokens' is missing")


def long_message() -> list[dict[str, str]]:
    """Return more words than the context window has tokens."""
    return [{"role": "user", "content": "word " * OPTIONS.max_model_len}]


def test_words_of_a_text_do_not_depend_on_what_was_asked_before() -> None:
    """A text that was looked up before gives the same ids, and another one shares its words."""
    words = Words()
    first = words.prompt([{"role": "system", "content": "a b c"}])
    other = words.prompt([{"role": "system", "content": "c d"}])
    assert words.prompt([{"role": "system", "content": "a b c"}]) == first
    assert other[:2] == [first[0], first[3]]


def test_requests_leave_at_their_moments_and_times_are_simulated_ones(engines: Engines) -> None:
    """With 10 machine seconds to one: 0.1 simulated seconds take one, whatever became of the request before."""
    found = asyncio.run(play(asks(0.0, 0.05), [target_at(engines.ports[0])], Texts(WORDS), scale=10.0))["engine"]
    for served in found:
        assert 0 <= served.late_s < 0.05
        assert 0 < served.first_s <= served.whole_s < 1


def test_what_is_no_answer_is_an_error() -> None:
    """A port where nobody listens: both requests are told of."""
    with_nobody = target_at(1)
    found = asyncio.run(play(asks(0.0, 0.01), [with_nobody], Texts(WORDS), scale=1.0))["engine"]
    assert [served.said for served in found] == [None, None]
    assert all("Error" in served.error for served in found)


def runs_of(*rows: tuple[float, int, float, int, int]) -> list[Run]:
    """Return runs from (arrival, profile, seconds to the first token, worker, cached tokens)."""
    return [
        Run(Ask(number, at, KNOWN[profile], 20), worker, cached, 10, first_at=at + first, done_at=at + first + 0.1)
        for number, (at, profile, first, worker, cached) in enumerate(rows)
    ]


def test_hits_are_a_share_of_what_could_be_found() -> None:
    """Two profiles asked for twice and once: one hit of 320 tokens was possible, and half of it was had."""
    runs = runs_of((0.0, 0, 0.5, 0, 0), (1.0, 1, 0.5, 1, 0), (2.0, 0, 0.1, 0, 160))
    told = http_figures.figures(Workload(()), runs, 1, 321, 2)
    assert told["hits"] == 0.5
    assert (told["ttft_p50"], told["ttft_p99"]) == pytest.approx((0.1, 0.5))
    assert (told["in_time"], told["imbalance"], told["errors"]) == (1.0, 1.0, 0.0)


def test_what_was_not_answered_counts_as_never() -> None:
    """It is an error, not in time, and waited for as long as a client waits."""
    runs = [*runs_of((0.0, 0, 0.5, 0, 0)), http_figures.run_of(Served(Ask(1, 1.0, KNOWN[0], 20), 0.0), {})]
    told = http_figures.figures(Workload(()), runs, 0, 321, 2)
    assert (told["errors"], told["in_time"], told["ttft_p99"], told["imbalance"]) == (1.0, 0.5, ANSWER_S, 2.0)


def test_a_crowd_that_never_spreads_counts_as_long_as_a_client_waits() -> None:
    """At 100 requests a second it needs several workers; with one it never has them."""
    rows = [(number / 100, 2, 0.2, number % 8, 0) for number in range(100)]
    told = http_figures.figures(Workload((), crowd=KNOWN[2]), runs_of(*rows), 0, 321, 8)
    assert 0.2 < told["spread_s"] < 0.3
    assert told["crowd_p90"] == pytest.approx(0.2)
    alone = runs_of(*((at, profile, first, 0, cached) for at, profile, first, _, cached in rows))
    assert http_figures.figures(Workload((), crowd=KNOWN[2]), alone, 0, 321, 8)["spread_s"] == ANSWER_S


def test_ratios_are_taken_seed_by_seed_against_the_best() -> None:
    """Whichever of the others was better with that seed."""
    ours, first, second = (
        [dict.fromkeys(http_figures.TTFT, value) for value in values] for values in ([1, 2], [4, 5], [2, 8])
    )
    told = http_figures.ratios(ours, http_figures.best([first, second]))
    assert (told["ttft_p90"], told["ttft_p90 least"], told["ttft_p90 most"]) == pytest.approx((0.45, 0.4, 0.5))


def test_caches_are_filled_gently() -> None:
    """The first two requests come at half of their rate, the others as far from one another as they were."""
    moved = gently(Workload(tuple(asks(1.0, 2.0, 3.0, 3.5))), 2, 0.5)
    assert [ask.at for ask in moved.asks] == [2.0, 4.0, 6.0, 6.5]


def test_answers_have_the_lengths_that_the_simulation_gives() -> None:
    """The same request always has the same."""
    lengths = [answer_tokens(ask) for ask in asks(*range(200))]
    assert ANSWER_TOKENS[0] <= min(lengths) < max(lengths) <= ANSWER_TOKENS[1]
    assert lengths == [answer_tokens(ask) for ask in asks(*range(200))]


def test_the_load_of_a_process_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that computes when it is told to is told apart from its parent, which waits for it."""
    monkeypatch.setattr(http_load, "EVERY_S", 0.02)
    work = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    program = f"print(1, flush=True)\ninput()\n{work}\nprint(2, flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        began = time.monotonic()
        with Watch({"child": [psutil.Process(child.pid)], "parent": [psutil.Process()]}) as watch:
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
        elapsed_s = time.monotonic() - began
    of_child = watch.loads["child"]
    assert 0.15 / elapsed_s <= of_child.mean <= of_child.most
    assert watch.machine > 0


def test_json_of_an_event_is_what_openai_clients_read(engines: Engines) -> None:
    """The role comes first, every word in a chunk of its own, usage last."""
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "stream": True}
    url = f"http://127.0.0.1:{engines.ports[0]}/v1/chat/completions"
    text = requests.post(url, json=body, timeout=10).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [len(event["choices"]) for event in events] == [1, 1, 1, 1, 0]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["finish_reason"] for event in events[:4]] == [None, None, None, "length"]
