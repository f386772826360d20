"""Three times as many questions come as the workers can answer, for two minutes.

An answer takes a second on average, so the site's capacity is known: its slots in a second. Clients come at random moments,
whatever became of those before, and take a refusal for an answer. First half the capacity comes, which is the calm; then
three times all of it. The queue is bounded to what drains in three quarters of an answer's time. Whoever is not taken gets
429 with a Retry-After; whoever is taken is answered about as soon as in the calm; and memory does not grow meanwhile.
"""

from __future__ import annotations

import time

import requests

from bench.chaoslab.calm import again_and_again, ask_calmly, questions
from bench.chaoslab.clients import Crowd
from bench.chaoslab.judge import judge
from bench.chaoslab.lab import Lab, Outcome, quantile
from bench.chaoslab.memory import Memory
from bench.chaoslab.record import read
from bench.chaoslab.site import Plan, Site

OVERLOAD_S, FACTOR = 120.0, 3.0
WORKERS, SLOTS = 2, 6
TOKENS_PER_S, TOKENS = 40.0, (20, 60)
ANSWER_S = sum(TOKENS) / 2 / TOKENS_PER_S
CAPACITY = WORKERS * SLOTS / ANSWER_S
WAITING = int(CAPACITY * ANSWER_S * 0.75)
PLAN = Plan(
    workers=WORKERS,
    slots=SLOTS,
    engine={"tokens_per_s_per_sequence": TOKENS_PER_S},
    settings={"SCHEDULING__MAX_WAITING": str(WAITING)},
)
#: A gateway goes on taking memory until its caches and threads are there; after that it must not.
GROWTH = 1.1


def run(lab: Lab) -> Outcome:
    """Run it."""
    rng = lab.rng("overload")
    overload_s = lab.seconds(OVERLOAD_S, least=4.0)
    with Site(lab.folder, lab.model, PLAN, lab.say) as site:
        answers = ask_calmly(site, questions(rng, WORKERS * SLOTS, TOKENS), lab.seed)
        memory = Memory(site.gateways)
        readiness: list[int] = []

        def come(per_second: float, seconds: float) -> Crowd:
            asked = again_and_again(rng, list(answers))
            with Crowd(site.urls, site.key, asked, seed=lab.seed, per_second=per_second) as crowd:
                site.progress = crowd.progress
                ends = time.monotonic() + seconds
                while time.monotonic() < ends:
                    memory.look()
                    readiness.append(requests.get(f"{site.urls[0]}/readyz", timeout=10).status_code)
                    site.wait(0.5)
                crowd.enough()
                site.see_out(crowd)
            return crowd

        calm = come(CAPACITY / 2, overload_s / 3)
        readiness.clear()
        began = time.time()
        crowd = come(CAPACITY * FACTOR, overload_s)
        ended = began + overload_s
        record = read(site.database_url)
    verdict = judge(record, [*calm.told, *crowd.told], answers)
    refusals = [refusal for told in crowd.told for refusal in told.refusals]
    waits = [int(after) for status, after in refusals if status == 429 and after and after.isdigit()]
    calm_p99, p99 = (quantile(_seconds(one), 0.99) for one in (calm, crowd))
    middle = began + (ended - began) / 2
    figures = {
        "asked": float(len(crowd.told)),
        "accepted": float(sum(told.request_id is not None for told in crowd.told)),
        "refused": float(len(refusals)),
        "refused_without_retry_after": float(len(refusals) - len(waits)),
        "retry_after_p50_s": quantile(waits, 0.5),
        "calm_p99_s": calm_p99,
        "admitted_p99_s": p99,
        "admitted_p99_to_calm": p99 / calm_p99,
        "unready_share": readiness.count(503) / len(readiness),
        "gateway_mib": memory.peak(middle, ended),
        "gateway_growth": memory.peak(middle, ended) / memory.peak(0.0, middle),
        **verdict.broken,
    }
    targets = {
        **verdict.targets(),
        "refused": (">=", 1.0),
        "refused_without_retry_after": ("<=", 0.0),
        "admitted_p99_to_calm": ("<=", 2.0),
        "gateway_growth": ("<=", GROWTH),
    }
    return Outcome(figures, targets, verdict.examples, timed=["admitted_p99_to_calm"])


def _seconds(crowd: Crowd) -> list[float]:
    """Return how long each admitted question took, from asking to the last frame."""
    return [told.ended_at - told.asked_at for told in crowd.told if told.ended_at is not None]
