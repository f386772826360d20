"""What the questions of docs/audit-queries.md about running requests must answer: written from what the page says in words."""

from __future__ import annotations

from itertools import pairwise, zip_longest

from tasks.schema import TERMINAL_KINDS
from tests.gateway_app.audit.counting import (
    Asked,
    Rows,
    attempts,
    columns,
    grouped,
    hour,
    of,
    percent,
    percentile,
    times,
    total,
)  # fmt: skip


def cache_hits(asked: Asked) -> Rows:
    """Tell how many prompt tokens were cached."""
    done = [
        event | {"profile_version": admitted["profile_version"]}
        for life in asked.arrived().values()
        if (event := of(life, "completed")) and (admitted := of(life, "admitted"))
        if event["organization"] == asked.parameters["organization"]
    ]
    return [
        {"agent_name": agent, "profile_version": version, "requests": len(events),
         "prompt_tokens": total(events, "prompt_tokens"), "cached_tokens": total(events, "cached_tokens"),
         "percent": percent(total(events, "cached_tokens"), total(events, "prompt_tokens"))}
        for (agent, version), events in grouped(done, lambda event: (event["agent_name"], event["profile_version"]))
    ]  # fmt: skip


def first_token(asked: Asked) -> Rows:
    """Tell times to the first token."""
    rows = [
        {"agent_name": agent, "requests": len(events)}
        | {f"p{share}_ms": percentile((event["first_token_ms"] for event in events), share) for share in (50, 95, 99)}
        for agent, events in grouped(asked.happened("completed"), lambda event: event["agent_name"])
    ]
    return sorted(rows, key=lambda row: -row["p95_ms"])


def queue_time(asked: Asked) -> Rows:
    """Tell times in the queue."""
    done = [event for life in asked.arrived().values() if (event := of(life, "completed"))]
    rows = []
    for name, events in grouped(done, hour):
        waits = [event["queued_ms"] for event in events]
        shares = {f"p{share}_ms": percentile(waits, share) for share in (50, 95)}
        rows.append({"hour": name, "requests": len(events), **shares, "longest_ms": max(waits)})
    return rows


def tokens_by_day(asked: Asked) -> Rows:
    """Sum tokens."""
    ends = [of(life, "completed", "cancelled", "expired") for life in asked.arrived().values()]
    answered = [event for event in ends if event and event["output_tokens"] is not None]
    rows = [
        {"day": day, "organization": organization, "answers": len(events)}
        | {name: total(events, name) for name in ("prompt_tokens", "cached_tokens", "output_tokens")}
        for (day, organization), events in grouped(answered, lambda event: (hour(event)[:10], event["organization"]))
    ]
    return sorted(rows, key=lambda row: (row["day"], -row["output_tokens"]))


def slowest(asked: Asked) -> Rows:
    """List the slowest requests."""
    names = "request_id agent_name worker attempt queued_ms first_token_ms total_ms prompt_tokens cached_tokens output_tokens"
    done = sorted(asked.happened("completed"), key=lambda event: (-event["total_ms"], event["request_id"]))
    return [
        columns(event, names) | {"finished_at": event["occurred_at"]} for event in done[: asked.parameters["limit"]]
    ]


def errors_by_hour(asked: Asked) -> Rows:
    """Count errors."""
    failed = asked.happened("failed", everybody=True)
    rows = [
        {"hour": name, "code": code, "failed": len(events),
         "organizations": len({event["organization"] for event in events})}
        for (name, code), events in grouped(failed, lambda event: (hour(event), event["code"]))
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (row["hour"], -row["failed"]))


def cancelled_expired(asked: Asked) -> Rows:
    """Count what was given up, of what was queued."""
    ended = [
        event
        for event in asked.happened("completed", "failed", "cancelled", "expired", "dead")
        if of(asked.lives[event["request_id"]], "admitted")
    ]
    rows = []
    for agent, events in grouped(ended, lambda event: event["agent_name"]):
        counts = {kind: sum(event["kind"] == kind for event in events) for kind in ("cancelled", "expired")}
        share = percent(sum(counts.values()), len(events))
        rows.append({"agent_name": agent, "ended": len(events), **counts, "percent": share})
    return sorted(rows, key=lambda row: -row["percent"])


def workers_lost(asked: Asked) -> Rows:
    """Count the attempts that workers took with them."""
    lost = []
    for life in asked.arrived().values():
        starts = attempts(life)
        back = {event["attempt"] for event in life if event["kind"] == "requeued"}
        lost += [(before["worker"], after, 0) for before, after in pairwise(starts) if before["attempt"] not in back]
        last = of(life, "dead")
        if last is not None and (last["details"] or {}).get("last_code") == "worker_lost":
            lost.append((starts[-1]["worker"], last, 1))
    rows = []
    for worker in sorted({worker for worker, _, _ in lost}):
        noticed = [event for name, event, _ in lost if name == worker]
        rows.append(
            {"worker": worker, "attempts_lost": len(noticed),
             "requests": len({event["request_id"] for event in noticed}),
             "given_up": sum(final for name, _, final in lost if name == worker),
             "first_at": times(noticed)[0], "last_at": times(noticed)[-1]}
        )  # fmt: skip
    return sorted(rows, key=lambda row: -row["attempts_lost"])


def on_worker(asked: Asked) -> Rows:
    """List what ran on a worker."""
    rows = []
    for life in asked.arrived().values():
        starts = attempts(life)
        for event, after in zip_longest(starts, starts[1:]):
            back = times(e for e in life if e["kind"] == "requeued" and e["attempt"] == event["attempt"])
            last = {"occurred_at": back[0], "kind": "requeued"} if back else after or of(life, *TERMINAL_KINDS)
            ended_at = last["occurred_at"] if last else None
            if event["worker"] != asked.parameters["worker"] or event["occurred_at"] >= asked.parameters["until"]:
                continue
            if ended_at is None or ended_at >= asked.parameters["since"]:
                outcome = "lost" if after and not back else last["kind"] if last else "running"
                names = "request_id organization agent_name attempt"
                when = {"started_at": event["occurred_at"], "ended_at": ended_at}
                rows.append(columns(event, names) | when | {"outcome": outcome})
    return sorted(rows, key=lambda row: (row["started_at"], row["request_id"], row["attempt"]))


def dead(asked: Asked) -> Rows:
    """List what died."""
    died = sorted(asked.happened("dead"), key=lambda event: (event["occurred_at"], event["request_id"]))
    return [
        columns(event, "request_id agent_name code worker")
        | {"died_at": event["occurred_at"], "attempts": event["attempt"]}
        | {"last_code": (event["details"] or {}).get("last_code")}
        for event in died
    ]


def begun_again(asked: Asked) -> Rows:
    """Count what went back into the queue."""
    back = [event for life in asked.arrived().values() for event in life if event["kind"] == "requeued"]
    rows = [
        {"code": code, "worker": worker, "times": len(events),
         "requests": len({event["request_id"] for event in events}),
         "first_at": times(events)[0], "last_at": times(events)[-1]}
        for (code, worker), events in grouped(back, lambda event: (event["code"], event["worker"] or ""))
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["times"])


def unfinished(asked: Asked) -> Rows:
    """List what has no end."""
    rows = []
    for request_id, life in sorted(asked.arrived().items()):
        received = of(life, "received")
        if received and not of(life, *TERMINAL_KINDS):
            attempts = sum(event["kind"] == "started" for event in life)
            rows.append(
                columns(received, "organization agent_name")
                | {"request_id": request_id, "received_at": received["occurred_at"], "attempts": attempts}
            )
    return rows


def one_end_each(asked: Asked) -> Rows:
    """Count the ends of requests."""
    lives = asked.arrived().values()
    ends = [sum(event["kind"] in TERMINAL_KINDS for event in life) for life in lives]
    begun = [sum(event["kind"] == "received" for event in life) for life in lives]
    return [
        {"requests": len(ends), "unrecorded": sum(number != 1 for number in begun), "not_ended": ends.count(0),
         "ended_twice": sum(number > 1 for number in ends)}
    ]  # fmt: skip
