"""One request among many kills whatever worker runs it.

The simulated engine has no bug to die of, so the scenario plays it: it watches the database, and as soon as an attempt of
the poison request has begun, the worker that runs it is killed with SIGKILL. After its last attempt the request must be
`dead`, with as many attempts as are allowed, and nobody else may suffer: not even those who shared its workers.
"""

from __future__ import annotations

import sqlalchemy as sa

from bench.chaoslab import recovery
from bench.chaoslab.calm import ask_calmly, questions
from bench.chaoslab.clients import Crowd
from bench.chaoslab.judge import judge
from bench.chaoslab.lab import Lab, Outcome
from bench.chaoslab.record import read
from bench.chaoslab.site import Plan, Site

REQUESTS = 1_000
MAX_ATTEMPTS = 3
PLAN = Plan(
    workers=2,
    engine={"tokens_per_s_per_sequence": 40.0},
    settings={"SCHEDULING__MAX_ATTEMPTS": str(MAX_ATTEMPTS)},
)
TOKENS = (8, 40)
#: Long enough never to be answered before it is noticed.
POISON_TOKENS = 2_000
END_S = 300.0
_RUNS = "SELECT state, attempt, worker FROM requests WHERE request_id = :id"


def run(lab: Lab) -> Outcome:
    """Run it."""
    rng = lab.rng("poison")
    total = lab.count(REQUESTS, least=10)
    [poison] = questions(rng, 1, (POISON_TOKENS, POISON_TOKENS))
    with Site(lab.folder, lab.model, PLAN, lab.say) as site:
        calm = ask_calmly(site, questions(rng, 24, TOKENS), lab.seed)
        asked = rng.choices(list(calm), k=total)
        # Early, so that there is traffic beside each of its attempts.
        asked[rng.randrange(total // 4)] = poison
        with Crowd(site.urls, site.key, asked, seed=lab.seed, at_once=32) as crowd:
            site.progress = crowd.progress
            request_id = site.until(lambda: _id_of(crowd, poison), END_S, "the poison request")
            kills = _kill_whoever_runs(site, request_id)
            site.see_out(crowd)
        record = read(site.database_url)
    others = [told for told in crowd.told if told.question != poison]
    [its] = [told for told in crowd.told if told.question == poison]
    verdict = judge(record, others, calm)
    figures = {
        "requests": float(len(record.rows)),
        "kills": float(kills),
        "poison_attempts": float(record.rows[request_id].attempt),
        "poison_dead": float(record.rows[request_id].state == "dead" and its.event == "dead"),
        "run_again_share": recovery.run_again(record),
        **verdict.broken,
    }
    targets = {**verdict.targets(), "poison_attempts": ("<=", float(MAX_ATTEMPTS)), "poison_dead": (">=", 1.0)}
    return Outcome(figures, targets, verdict.examples)


def _id_of(crowd: Crowd, poison: object) -> str | None:
    return next((told.request_id for told in [*crowd.told] if told.question == poison), None)


def _kill_whoever_runs(site: Site, request_id: str) -> int:
    """Kill the worker of each attempt as it begins, until the request has ended; return how many kills that took."""
    engine = sa.create_engine(site.database_url)
    seen = 0

    def look() -> bool:
        nonlocal seen
        with engine.connect() as connection:
            state, attempt, worker = connection.execute(sa.text(_RUNS), {"id": request_id}).one()
        if state == "running" and attempt > seen:
            seen = attempt
            [runs_it] = [process for process in site.workers if process.name == worker]
            runs_it.kill()
        return state not in ("queued", "running")

    try:
        site.until(look, END_S, "the end of the poison request")
    finally:
        engine.dispose()
    return seen
