"""The scheduling benchmark, in small: the virtual fleet, the models of other gateways' rules, and the queue in virtual time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from bench.schedulinglab import goodput, virtual_queue
from bench.schedulinglab.figures import bound, figures, percentile
from bench.schedulinglab.fleet import Fleet, Rule, Run, Worker
from bench.schedulinglab.push import LeastLoaded, RoundRobin, Router
from bench.schedulinglab.reserve_cost import reserve_cost
from bench.schedulinglab.rivals import CacheAware, Dynamo, LlmD, PrefixHash
from bench.schedulinglab.running import OURS, Job, Outcome, fresh_redis, run, serve
from bench.schedulinglab.scenarios import OPTIONS, SCENARIOS, Workload
from bench.schedulinglab.workload import Ask, Profile, profiles
from tasks.queueing.pull import Wish
from tests.workers import ROOT

WORKERS = 3


def asks(*made: Profile, every_s: float = 1.0, first: int = 0) -> list[Ask]:
    """Return a request for each of the profiles, one after the other."""
    return [Ask(first + number, (first + number) * every_s, profile, 160) for number, profile in enumerate(made)]


def pushed(rule: Rule, *made: Ask) -> list[int]:
    """Return where a router sends requests."""
    return [each.worker for each in Fleet(rule, WORKERS, OPTIONS).serve(made)]


def test_a_first_token_takes_what_the_simulation_says_and_a_cached_profile_is_not_computed_again() -> None:
    """5 ms a step, 0.03 ms a sequence, 25,000 prompt tokens a second."""
    [profile] = profiles(1, 6_000)
    cold, cached = Fleet(RoundRobin(1), 1, OPTIONS).serve(asks(profile, profile, every_s=30.0))
    assert cold.ttft == pytest.approx(0.005 + 0.00003 + 6_160 / 25_000)
    assert cached.ttft == pytest.approx(0.005 + 0.00003 + 160 / 25_000)
    assert (cold.cached_tokens, cached.cached_tokens) == (0, 6_000)


def test_profiles_that_share_a_base_share_its_blocks_and_its_link() -> None:
    """What comes after the base is each one's own."""
    one, other = (Profile((("base", 3_200), (role, 1_600))) for role in ("role 1", "role 2"))
    assert one.chain == other.chain == ((one.chain[0][0], 3_200),)
    assert one.name != other.name
    _, second = Fleet(RoundRobin(1), 1, OPTIONS).serve(asks(one, other))
    assert second.cached_tokens == 3_200


@pytest.mark.parametrize("rule", [RoundRobin, LeastLoaded, CacheAware, PrefixHash, LlmD, Dynamo])
@pytest.mark.parametrize("scenario", ["worker_lost", "shared_bases"])
def test_a_router_loses_nothing_and_finds_no_more_than_there_is(rule: type[Router], scenario: str) -> None:
    """Whatever happens to the workers, every request ends."""
    workload = SCENARIOS[scenario](100.0, 40, 1)
    fleet = Fleet(rule(1), 8, OPTIONS)
    found = figures(fleet, workload, fleet.serve(workload.asks, workload.losses))
    assert found.unfinished == 0
    assert 0 <= found.hits <= 1
    assert all(worker.in_hand == {} for worker in fleet.workers)


def test_sglangs_tree_keeps_a_profile_where_it_was_sent_until_loads_differ_too_much() -> None:
    """Whether it is cached there is not looked at."""
    first, second = profiles(2, 6_000)
    # The second goes to another worker, whose tree is smaller.
    one, two, again, back = pushed(CacheAware(1), *asks(first, second, first, second))
    assert one != two
    assert (again, back) == (one, two)
    # More than 64 more than on the least loaded: the next is sent there.
    crowd = pushed(CacheAware(1), *asks(*[first] * 70, every_s=1e-6))
    assert set(crowd[:65]) == {crowd[0]}
    assert crowd[65] != crowd[0]


def test_prefix_hashing_leaves_a_worker_that_has_more_than_its_share() -> None:
    """Until then the ring alone decides."""
    first, *_ = profiles(2, 6_000)
    assert len(set(pushed(PrefixHash(1), *asks(first, first, first, every_s=30.0)))) == 1
    assert len(set(pushed(PrefixHash(1), *asks(first, first, first, every_s=1e-6)))) == WORKERS


def test_llm_ds_scores_follow_the_cache_and_dynamos_cost_what_is_still_to_be_computed() -> None:
    """Both know exactly what is cached."""
    first, second = profiles(2, 6_000)
    for rule in (LlmD(1), Dynamo(1)):
        one, other, again = pushed(rule, *asks(first, second, first, every_s=30.0))
        assert again == one, rule
    # While a prompt is being computed, Dynamo counts it, and an idle worker is cheaper.
    one, other = pushed(Dynamo(1), *asks(first, second, every_s=1e-6))
    assert one != other


def test_the_queue_in_virtual_time_is_the_same_each_time_and_beats_first_in_first_out() -> None:
    """Nothing of this machine is in the figures."""
    job = Job(OURS, "shared_bases", 150.0, 48, 3)
    found = run(job).figures
    assert found == run(job).figures
    assert found.unfinished == 0
    assert found.hits > run(replace(job, rule="fifo")).figures.hits


def test_what_a_dead_worker_had_comes_back_when_its_leases_end() -> None:
    """And others run it."""
    made = SCENARIOS["worker_lost"](200.0, 40, 1)
    fleet, runs = serve(OURS, made, 1)
    assert all(math.isfinite(each.done_at) for each in runs)
    [(died_at, dead)] = made.losses
    late = [each for each in runs if each.ask.at < died_at and each.done_at > died_at + 60]
    assert late, "the dead worker had nothing in hand"
    assert all(each.worker != dead for each in late)
    assert figures(fleet, made, runs).ttft_p50 < 1


def test_the_bench_tells_when_the_scripts_no_longer_read_their_clock_as_it_thinks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it would measure in another time than its own."""
    with ExitStack() as closing:
        queue = virtual_queue.VirtualQueue(fresh_redis(closing), OURS, ["gpu@0"])
        queue.now = 5.0
        [profile] = profiles(1, 6_000)
        queue.put(asks(profile)[0], "0")
        tags, _, decision, left = queue.reserve("gpu@0", Wish("gpu@0", room=1, budget=8_192))
        assert (tags, left) == (["0"], False)
        assert decision["at"] == virtual_queue.EPOCH_S + 5
        monkeypatch.setattr(virtual_queue, "_READS_TIME", "redis.call('CLOCK')")
        with pytest.raises(RuntimeError, match="clock"):
            queue.run("restore", 60, 10, 10)


def test_the_bound_counts_every_shared_block_once() -> None:
    """Four requests, one base, two roles."""
    one, other = (Profile((("base", 1_600), (role, 1_600))) for role in ("role 1", "role 2"))
    fleet = Fleet(RoundRobin(1), WORKERS, OPTIONS)
    runs = [Run(each) for each in asks(one, other, one, other)]
    assert bound(fleet, runs) == 4 * 3_200 - 1_600 - 2 * 1_600


def test_percentiles_and_bisection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest rate lies below the first that fails."""
    assert [percentile([1.0, 2.0, 3.0, 4.0], share) for share in (0.01, 0.5, 0.9, 1.0)] == [1.0, 2.0, 4.0, 4.0]
    given = run(Job("least_loaded (push)", "one_profile", 50.0, 10, 1))
    asked: list[float] = []

    def up_to_100(job: Job) -> Outcome:
        asked.append(job.rate)
        return Outcome(job, replace(given.figures, in_time=0.91 if job.rate <= 100 else 0.5))

    monkeypatch.setattr(goodput, "run", up_to_100)
    rate, points = goodput.bisect("any", "one_profile", 10, 1)
    assert 100 - goodput.PRECISION <= rate <= 100
    assert [point[0] for point in points] == sorted(asked)


def test_busy_time_is_that_between_two_instants() -> None:
    """Steps count as far as they lie in between."""
    worker = Worker(Fleet(RoundRobin(1), 1, OPTIONS), 0, OPTIONS)
    worker.steps = [(0.0, 1.0), (2.0, 1.0)]
    assert worker.busy_between() == 2.0
    assert worker.busy_between(0.5, 2.25) == pytest.approx(0.75)


def test_redis_time_and_memory_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In small: how much they are is the benchmark's to say."""
    for name, value in {"LISTS": 40, "WORKERS": 4, "TIMED": 10, "ON_GPU": 5, "WITH_TIERS": 20}.items():
        monkeypatch.setattr(f"bench.schedulinglab.reserve_cost.{name}", value)
    found = reserve_cost(1)
    for name in ("reserve", "reserve_one_organization", "reserve_with_tiers"):
        assert 0 < found[f"{name}_p50_us"] <= found[f"{name}_p99_us"]
        assert found[f"{name}_processor_us"] > 0
        assert found[f"{name}_memory_a_profile_bytes"] > 0
        assert found[f"{name}_memory_a_request_bytes"] > 1_500


def test_the_command_writes_figures_and_pictures(tmp_path: Path) -> None:
    """The whole, for two rules and a few requests."""
    figures_file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.scheduling", "sweep", "--scenarios", "flash_crowd", "--requests", "40"]
    options = ["--rules", OURS, "dynamo", "--seeds", "1", "--processes", "1", "--json", str(figures_file)]
    done = subprocess.run(
        [*command, *options, "--images", str(tmp_path), "--markdown", str(tmp_path / "table.md")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in {0, 1}, done.stderr
    written = json.loads(figures_file.read_text())
    assert written["figures"]["flash_crowd_130_hits"] <= 1
    assert written["held"] is (done.returncode == 0)
    assert {"dynamo", OURS} == {
        each["job"]["rule"] for each in json.loads((tmp_path / "figures.runs.json").read_text())
    }
    assert (tmp_path / "table.md").read_text().count("|") == 3 * 4
    assert (tmp_path / "scheduling-first-tokens.svg").stat().st_size > 0
    assert (tmp_path / "scheduling-first-tokens.png").stat().st_size > 0


def test_a_workload_is_the_same_for_a_seed_and_another_for_another() -> None:
    """All rules get the same requests."""
    for name, scenario in SCENARIOS.items():
        assert scenario(50.0, 30, 1) == scenario(50.0, 30, 1), name
        assert scenario(50.0, 30, 1) != scenario(50.0, 30, 2), name
        made = scenario(50.0, 300, 1)
        assert isinstance(made, Workload)
        assert [ask.at for ask in made.asks] == sorted(ask.at for ask in made.asks)
