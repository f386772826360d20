"""An hour-long request under a lease of a minute, in scaled time: sixty leases long, and it runs once.

Stock Celery gives a message to a second worker when it has run for its visibility timeout, so a long task runs twice.
Here the lease is renewed for as long as the worker lives, and other workers, with nothing else to do than to sweep for
ended leases, leave it alone.
"""

from __future__ import annotations

from bench.chaoslab import recovery
from bench.chaoslab.asking import Question
from bench.chaoslab.calm import ask_calmly, questions
from bench.chaoslab.clients import Crowd
from bench.chaoslab.judge import judge
from bench.chaoslab.lab import Lab, Outcome
from bench.chaoslab.record import read
from bench.chaoslab.site import Plan, Site

LEASES = 60
TOKENS_PER_S = 20.0
PLAN = Plan(workers=2, lease_s=2.0, engine={"tokens_per_s_per_sequence": TOKENS_PER_S})
LONG_REQUESTS = 4


def run(lab: Lab) -> Outcome:
    """Run it."""
    rng = lab.rng("long")
    leases = lab.seconds(LEASES, least=3.0)
    tokens = int(leases * PLAN.lease_s * TOKENS_PER_S)
    with Site(lab.folder, lab.model, PLAN, lab.say) as site:
        # A shorter answer to the same prompt is a prefix of a longer one, and a token is a word with a space: so its text
        # is known closely enough without waiting for it twice.
        short = questions(rng, LONG_REQUESTS, (20, 20))
        calm = ask_calmly(site, short, lab.seed)
        asked = [Question(question.directive, tokens, question.seed) for question in short]
        with Crowd(site.urls, site.key, asked, seed=lab.seed, at_once=LONG_REQUESTS) as crowd:
            site.progress = crowd.progress
            site.see_out(crowd)
        record = read(site.database_url)
    prefixes = {question.directive: text for question, text in calm.items()}
    right = {
        told.question: told.text
        for told in crowd.told
        if told.text.startswith(prefixes[told.question.directive]) and told.text.count(" ") == tokens
    }
    verdict = judge(record, crowd.told, {question: right.get(question, "") for question in asked})
    ran = [told.ended_at - told.accepted_at for told in crowd.told if told.ended_at is not None]
    figures = {
        "requests": float(len(asked)),
        "leases_long": min(ran, default=0.0) / PLAN.lease_s,
        "attempts_max": float(max(record.rows[told.request_id].attempt for told in crowd.told if told.request_id)),
        "run_again_share": recovery.run_again(record),
        **verdict.broken,
    }
    targets = {**verdict.targets(), "attempts_max": ("<=", 1.0), "leases_long": (">=", 0.95 * leases)}
    return Outcome(figures, targets, verdict.examples)
