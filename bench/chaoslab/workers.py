"""Workers are killed with SIGKILL at random moments, while a crowd asks thousands of questions.

A kill falls at a random point of the progress, and on a random worker that works: in the middle of answers, of a commit,
of taking a message. A supervisor starts it again at once, under the same name. Nothing may be lost, every request ends
with exactly one terminal event, and every stream's text is what it is without kills. How many requests run again, and
how long they wait for it, is reported: a lost lease ends after `lease_s` and is found by a sweep each quarter of it.
"""

from __future__ import annotations

import time

from bench.chaoslab import recovery
from bench.chaoslab.calm import ask_calmly, questions
from bench.chaoslab.clients import Crowd
from bench.chaoslab.judge import judge
from bench.chaoslab.kills import kill_along
from bench.chaoslab.lab import Lab, Outcome
from bench.chaoslab.record import read
from bench.chaoslab.site import Plan, Site

REQUESTS, KILLS = 20_000, 200
#: Twenty tokens take 0.4 s: several answers are cut at each kill.
TOKENS_PER_S = 50.0
PLAN = Plan(
    workers=3,
    engine={"tokens_per_s_per_sequence": TOKENS_PER_S},
    # By chance alone a few of so many requests are hit three times. What a poison request does is another scenario.
    settings={"SCHEDULING__MAX_ATTEMPTS": "20"},
)


def run(lab: Lab) -> Outcome:
    """Run it."""
    rng = lab.rng("workers")
    total, kills = lab.count(REQUESTS), lab.count(KILLS)
    with Site(lab.folder, lab.model, PLAN, lab.say) as site:
        calm = ask_calmly(site, questions(rng, 24, (8, 40)), lab.seed)
        asked = rng.choices(list(calm), k=total)
        began = time.monotonic()
        with Crowd(site.urls, site.key, asked, seed=lab.seed, at_once=48) as crowd:
            killed = kill_along(site, crowd, site.workers, total=total, kills=kills, rng=rng)
        seconds = time.monotonic() - began
        record = read(site.database_url)
    verdict = judge(record, crowd.told, calm)
    figures = {
        "requests": float(len(record.rows)),
        "kills": float(kills),
        "requests_per_s": total / seconds,
        **verdict.broken,
        **recovery.figures(record, killed, PLAN.lease_s),
        "end_told_max_leases": max(recovery.told_after_s(record, crowd.told)) / PLAN.lease_s,
    }
    return Outcome(figures, verdict.targets(), verdict.examples)
