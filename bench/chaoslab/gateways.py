"""Gateways are killed with SIGKILL while they take requests and stream answers.

Two gateways share one Redis and one database. A kill cuts the streams it carries and the submissions it was about to
answer. Clients go to the other one, or wait for the first to be back: they submit again under the same idempotency key, and read on from the last frame they
saw. Every 202 and every streamed id must end, and no byte of a text that was resumed may be missing or there twice.
"""

from __future__ import annotations

from bench.chaoslab import recovery
from bench.chaoslab.calm import ask_calmly, questions
from bench.chaoslab.clients import Crowd
from bench.chaoslab.judge import judge
from bench.chaoslab.kills import kill_along
from bench.chaoslab.lab import Lab, Outcome
from bench.chaoslab.record import read
from bench.chaoslab.site import Plan, Site

REQUESTS, KILLS = 4_000, 100
#: Answers of one or two seconds, so that a kill cuts every stream that its gateway carries.
PLAN = Plan(gateways=2, workers=2, slots=24, engine={"tokens_per_s_per_sequence": 30.0})
TOKENS = (20, 60)


def run(lab: Lab) -> Outcome:
    """Run it."""
    rng = lab.rng("gateways")
    total, kills = lab.count(REQUESTS), lab.count(KILLS)
    with Site(lab.folder, lab.model, PLAN, lab.say) as site:
        calm = ask_calmly(site, questions(rng, 24, TOKENS), lab.seed)
        asked = rng.choices(list(calm), k=total)
        with Crowd(site.urls, site.key, asked, seed=lab.seed, at_once=48) as crowd:
            kill_along(site, crowd, site.gateways, total=total, kills=kills, rng=rng)
        record = read(site.database_url)
    verdict = judge(record, crowd.told, calm)
    figures = {
        "requests": float(len(record.rows)),
        "kills": float(kills),
        "streams_resumed": float(sum(told.resumed > 0 for told in crowd.told)),
        "run_again_share": recovery.run_again(record),
        **verdict.broken,
    }
    # A run in which no stream was cut would show nothing.
    return Outcome(figures, {**verdict.targets(), "streams_resumed": (">=", float(kills))}, verdict.examples)
