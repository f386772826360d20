"""What the questions of docs/audit-queries.md must answer, counted in plain Python from all events.

Each function is written from what the page says in words, and returns the rows in the order that the page gives them. These
here answer the questions about what was asked and decided; those about running requests are in `answers_of_runs`.
"""

from __future__ import annotations

from collections.abc import Callable

from tasks.schema import TERMINAL_KINDS
from tests.gateway_app.audit import answers_of_runs as runs
from tests.gateway_app.audit.counting import Asked, Rows, columns, grouped, of, percent, times, total


def who_asked(asked: Asked) -> Rows:
    """Tell which key asked which agent for what."""
    rows = [
        {
            "api_key_id": key, "key_name": asked.keys[key], "agent": agent, "task": task, "requests": len(events),
            "accepted": sum(event["kind"] == "admitted" for event in events),
            "first_at": times(events)[0], "last_at": times(events)[-1],
        }
        for (key, agent, task), events in grouped(
            asked.decided("admitted", "vetoed", "failed"),
            lambda event: (event["api_key_id"], event["agent_name"] or "", event["task_type"] or ""),
        )
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["requests"])


def key_activity(asked: Asked) -> Rows:
    """List the newest requests of a key."""
    mine = [life for life in asked.lives.values() if life[0]["api_key_id"] == asked.parameters["key_id"]]
    mine = [life for life in mine if life[0]["request_id"] < asked.parameters["until_id"]]
    mine.sort(key=lambda life: life[0]["request_id"], reverse=True)
    rows = []
    for life in mine[: asked.parameters["limit"]]:
        received, admitted, last = of(life, "received"), of(life, "admitted") or {}, of(life, *TERMINAL_KINDS) or {}
        assert received is not None
        # Who is refused after queueing is decided upon twice; the second time counts.
        decision = {
            name: last.get(name) or admitted.get(name)
            for name in ("agent_name", "task_type", "sensitivity", "provider")
        }
        rows.append(
            {"request_id": received["request_id"], "received_at": received["occurred_at"],
             "organization": received["organization"], **decision, "outcome": last.get("kind"), "code": last.get("code")}
        )  # fmt: skip
    return rows


def one_request(asked: Asked) -> Rows:
    """Tell a request's life."""
    names = (
        "occurred_at kind attempt agent_name profile_version sensitivity provider policy reason code worker "
        "prompt_tokens cached_tokens output_tokens queued_ms first_token_ms total_ms details"
    )
    life = sorted(asked.lives[asked.parameters["request_id"]], key=lambda event: event["occurred_at"])
    return [columns(event, names) for event in life]


def request_row(asked: Asked) -> Rows:
    """Tell a request's life in one row."""
    life = asked.lives[asked.parameters["request_id"]]
    received, admitted, last = (of(life, *kinds) for kinds in (("received",), ("admitted",), TERMINAL_KINDS))
    assert received is not None
    assert admitted is not None
    assert last is not None
    return [
        columns(received, "request_id organization agent_name")
        | columns(admitted, "profile_version sensitivity provider")
        | columns(last, "code worker prompt_tokens cached_tokens output_tokens first_token_ms total_ms")
        | {"outcome": last["kind"], "attempts": last["attempt"]}
        | {"received_at": received["occurred_at"], "finished_at": last["occurred_at"]}
    ]


def sensitivity_by_agent(asked: Asked) -> Rows:
    """Count sensitivities."""
    rows = [
        {"agent_name": agent, "requests": len(events)}
        | {
            name: sum(event["sensitivity"] == name for event in events)
            for name in ("public", "internal", "sensitive", "critical")
        }
        for agent, events in grouped(asked.decided("admitted", "vetoed"), lambda event: event["agent_name"])
    ]
    return sorted(rows, key=lambda row: -row["requests"])


def provider_shares(asked: Asked) -> Rows:
    """Count providers of what was accepted."""
    accepted = asked.happened("admitted")
    rows = [
        {"provider": provider, "requests": len(events), "percent": percent(len(events), len(accepted)),
         "chosen_by_gateway": sum(event["reason"] == "auto_recommendation" for event in events)}
        for provider, events in grouped(accepted, lambda event: event["provider"])
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["requests"])


def refusals(asked: Asked) -> Rows:
    """Count refusals by their reasons."""
    names = ("policy", "sensitivity", "provider", "reason")
    rows = [
        dict(zip(names, key, strict=True))
        | {"refused": len(events), "last_at": times(events)[-1]}
        | {"after_queueing": sum(of(asked.lives[event["request_id"]], "admitted") is not None for event in events)}
        for key, events in grouped(asked.happened("vetoed"), lambda event: tuple(event[name] for name in names))
    ]
    return sorted(rows, key=lambda row: -row["refused"])


def vetoes_by_project(asked: Asked) -> Rows:
    """Count refusals by project."""
    vetoed = [event for event in asked.happened("vetoed") if event["project_id"]]
    rows = [
        {"project_id": project, "vetoes": len(events), "agents": len({event["agent_name"] for event in events}),
         "artifacts": len({event["artifact_id"] for event in events}),
         "first_at": times(events)[0], "last_at": times(events)[-1]}
        for project, events in grouped(vetoed, lambda event: event["project_id"])
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["vetoes"])


def detected(asked: Asked) -> Rows:
    """Count what was detected."""
    found = [
        {
            "detected": kind,
            "sensitivity": event["sensitivity"],
            "findings": number,
            "refused": event["kind"] == "vetoed",
        }
        for event in asked.decided("admitted", "vetoed")
        for kind, number in event["details"].get("detected", {}).items()
    ]
    rows = [
        {"detected": kind, "sensitivity": sensitivity, "requests": len(events), "findings": total(events, "findings"),
         "refused": total(events, "refused")}
        for (kind, sensitivity), events in grouped(found, lambda event: (event["detected"], event["sensitivity"]))
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["requests"])


def changes(kind: str, names: str) -> Callable[[Asked], Rows]:
    """Return what lists the changes of one kind."""
    return lambda asked: [
        {**columns(event, names), "key_name": asked.keys.get(event["api_key_id"])}
        for event in sorted(
            asked.happened(kind, everybody=True), key=lambda event: (event["occurred_at"], event["request_id"])
        )
    ]


def policy_version(asked: Asked) -> Rows:
    """Count what ran under a version."""
    names = ("agent_name", "policy", "sensitivity", "provider")
    ran = [
        event
        for life in asked.arrived().values()
        if (event := of(life, "admitted")) and of(life, "started")
        if event["organization"] == asked.parameters["organization"]
        if event["details"]["policy_version"] == asked.parameters["policy_version"]
    ]
    rows = [
        dict(zip(names, key, strict=True))
        | {"requests": len(events), "first_at": times(events)[0], "last_at": times(events)[-1]}
        for key, events in grouped(ran, lambda event: tuple(event[name] for name in names))
    ]
    return sorted(rows, key=lambda row: -row["requests"])


ANSWERS: dict[str, Callable[[Asked], Rows]] = {
    "who-asked": who_asked,
    "key-activity": key_activity,
    "one-request": one_request,
    "request-row": request_row,
    "sensitivity-by-agent": sensitivity_by_agent,
    "provider-shares": provider_shares,
    "refusals": refusals,
    "vetoes-by-project": vetoes_by_project,
    "detected": detected,
    "policy-changes": changes("policy_changed", "occurred_at organization api_key_id policy reason details"),
    "profile-changes": changes(
        "profile_changed", "occurred_at organization api_key_id agent_name profile_version details"
    ),
    "policy-version": policy_version,
    "cache-hits": runs.cache_hits,
    "first-token": runs.first_token,
    "queue-time": runs.queue_time,
    "tokens-by-day": runs.tokens_by_day,
    "slowest": runs.slowest,
    "errors-by-hour": runs.errors_by_hour,
    "cancelled-expired": runs.cancelled_expired,
    "workers-lost": runs.workers_lost,
    "on-worker": runs.on_worker,
    "dead": runs.dead,
    "begun-again": runs.begun_again,
    "unfinished": runs.unfinished,
    "one-end-each": runs.one_end_each,
}
