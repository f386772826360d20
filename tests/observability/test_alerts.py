"""Each alert speaks up where something is wrong, and keeps silent where it is not: promtool plays the series."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.services.prometheus_server import programs
from tests.test_docs_metrics import OBSERVABILITY, rules

W = '{job="metaqore-worker",instance="w"}'
G = '{job="metaqore-gateway",instance="g"}'
#: Of each alert, the series that make it fire, in promtool's notation of a value a minute, and others that do not.
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "MetaqoreDown": ({f"up{W}": "0x20"}, {f"up{W}": "1x20"}),
    "MetaqoreQueueUnreachable": ({"metaqore_queue_up": "0x20"}, {"metaqore_queue_up": "1x20"}),
    "MetaqoreDatabaseAway": (
        {'metaqore_database_commits_failed_total{reason="away"}': "0x15 1x5"},
        {'metaqore_database_commits_failed_total{reason="away"}': "7x20"},
    ),
    "MetaqoreNoWorker": (
        {'metaqore_workers{state="ready"}': "0x20", 'metaqore_workers{state="loading"}': "1x20"},
        {'metaqore_workers{state="ready"}': "1x20"},
    ),
    "MetaqoreNoHousekeeper": ({"metaqore_housekeeper_leads": "0x20"}, {"metaqore_housekeeper_leads": "1x20"}),
    "MetaqoreServerErrors": (
        {
            'metaqore_http_requests_total{status="200"}': "0+90x20",
            'metaqore_http_requests_total{status="503"}': "0+10x20",
        },
        {
            'metaqore_http_requests_total{status="200"}': "0+90x20",
            'metaqore_http_requests_total{status="429"}': "0+90x20",
        },
    ),
    "MetaqoreSlowFirstToken": (
        {
            'metaqore_first_token_seconds_bucket{priority="normal",le="10"}': "0x30",
            'metaqore_first_token_seconds_bucket{priority="normal",le="+Inf"}': "0+60x30",
            'metaqore_first_token_seconds_bucket{priority="normal",le="30"}': "0+60x30",
        },
        {
            'metaqore_first_token_seconds_bucket{priority="normal",le="1"}': "0+60x30",
            'metaqore_first_token_seconds_bucket{priority="normal",le="+Inf"}': "0+60x30",
            'metaqore_first_token_seconds_bucket{priority="low",le="1"}': "0x30",
            'metaqore_first_token_seconds_bucket{priority="low",le="+Inf"}': "0+600x30",
        },
    ),
    "MetaqoreQueueOld": (
        {'metaqore_queue_oldest_seconds{priority="high"}': "200x20"},
        {
            'metaqore_queue_oldest_seconds{priority="high"}': "100x20",
            'metaqore_queue_oldest_seconds{priority="low"}': "9000x20",
        },
    ),
    "MetaqoreQueueNearlyFull": (
        {"metaqore_queue_tokens": "900x20", 'metaqore_queue_limit{what="tokens"}': "1000x20"},
        {
            'metaqore_queue_requests{instance="a",priority="high"}': "500x20",
            'metaqore_queue_requests{instance="b",priority="high"}': "500x20",
            'metaqore_queue_limit{what="requests"}': "1000x20",
        },
    ),
    "MetaqoreEngineStuck": (
        {
            'metaqore_engine_sequences{job="j",instance="w",state="running"}': "3x20",
            'metaqore_engine_steps_total{job="j",instance="w"}': "500x20",
        },
        {
            'metaqore_engine_sequences{job="j",instance="w",state="running"}': "3x20",
            'metaqore_engine_steps_total{job="j",instance="w"}': "0+1x20",
            'metaqore_engine_sequences{job="j",instance="idle",state="running"}': "0x20",
            'metaqore_engine_steps_total{job="j",instance="idle"}': "500x20",
        },
    ),
    "MetaqorePreemptions": (
        {f"metaqore_engine_preemptions_total{W}": "0+60x30"},
        {f"metaqore_engine_preemptions_total{W}": "0+1x30"},
    ),
    "MetaqoreBreakerOpen": ({"metaqore_governance_breaker_open": "1x20"}, {"metaqore_governance_breaker_open": "0x20"}),
    "MetaqoreRequestsDead": (
        {'metaqore_audit_events_total{kind="dead",code="attempts_exhausted"}': "0x15 1x5"},
        {'metaqore_audit_events_total{kind="dead",code="attempts_exhausted"}': "3x20"},
    ),
    "MetaqoreRetries": (
        {
            'metaqore_audit_events_total{kind="requeued",code="engine_dead"}': "0+10x20",
            'metaqore_audit_events_total{kind="started",code=""}': "0+100x20",
        },
        {
            'metaqore_audit_events_total{kind="requeued",code="worker_draining"}': "0+10x20",
            'metaqore_audit_events_total{kind="requeued",code="engine_dead"}': "0+1x20",
            'metaqore_audit_events_total{kind="started",code=""}': "0+100x20",
        },
    ),
    "MetaqoreRedisLostRequests": (
        {'metaqore_audit_events_total{kind="requeued",code="queue_lost"}': "0x15 4x5"},
        {'metaqore_audit_events_total{kind="requeued",code="engine_dead"}': "0x15 4x5"},
    ),
    "MetaqoreLeasesLost": ({f"metaqore_leases_lost_total{W}": "0x15 1x5"}, {f"metaqore_leases_lost_total{W}": "1x20"}),
    "MetaqoreLeasesNotRenewed": (
        {f"metaqore_lease_renewal_age_seconds{W}": "30x20"},
        {f"metaqore_lease_renewal_age_seconds{W}": "2x20"},
    ),
    "MetaqoreMessagesRefused": (
        {f"metaqore_messages_refused_total{W}": "0x15 1x5"},
        {f"metaqore_messages_refused_total{W}": "1x20"},
    ),
    "MetaqoreRequestOpenForLong": (
        {"metaqore_housekeeping_oldest_open_seconds": "4000x20"},
        {"metaqore_housekeeping_oldest_open_seconds": "400x20"},
    ),
    "MetaqoreAuditLag": (
        {
            'metaqore_audit_commit_lag_seconds_bucket{job="j",le="0.5"}': "0x20",
            'metaqore_audit_commit_lag_seconds_bucket{job="j",le="1"}': "0+60x20",
            'metaqore_audit_commit_lag_seconds_bucket{job="j",le="+Inf"}': "0+60x20",
        },
        {
            'metaqore_audit_commit_lag_seconds_bucket{job="j",le="0.1"}': "0+60x20",
            'metaqore_audit_commit_lag_seconds_bucket{job="j",le="+Inf"}': "0+60x20",
        },
    ),
    "MetaqoreCommitHangs": (
        {f"metaqore_audit_uncommitted_seconds{G}": "6x20"},
        {f"metaqore_audit_uncommitted_seconds{G}": "0.1x20"},
    ),
    "MetaqoreDatabasePoolFull": (
        {
            'metaqore_database_pool_connections{job="j",state="in_use"}': "8x20",
            'metaqore_database_pool_size{job="j"}': "8x20",
        },
        {
            'metaqore_database_pool_connections{job="j",state="in_use"}': "1x20",
            'metaqore_database_pool_connections{job="j",state="idle"}': "8x20",
            'metaqore_database_pool_size{job="j"}': "8x20",
        },
    ),
    "MetaqoreRedisPoolFull": (
        {f"metaqore_redis_pool_in_use{G}": "16x20", f"metaqore_redis_pool_size{G}": "16x20"},
        {f"metaqore_redis_pool_in_use{G}": "15x20", f"metaqore_redis_pool_size{G}": "16x20"},
    ),
    "MetaqoreGatewayFull": (
        {f"metaqore_sockets_open{G}": "500x20", f"metaqore_sockets_limit{G}": "512x20"},
        {f"metaqore_http_requests_in_progress{G}": "500x20", f"metaqore_http_threads{G}": "1200x20"},
    ),
}


def play(name: str, series: dict[str, str], fires: int) -> dict[str, object]:
    """Return promtool's test: after 18 minutes of `series` so many alerts of this name fire."""
    expression = f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)'
    samples = [{"value": fires, "labels": "{}"}]
    return {
        "interval": "1m",
        "name": f"{name}: {fires}",
        "input_series": [{"series": each, "values": values} for each, values in series.items()],
        "promql_expr_test": [{"expr": expression, "eval_time": "18m", "exp_samples": samples}],
    }


def test_every_alert_has_its_case() -> None:
    """One that is added is played too."""
    assert list(CASES) == [rule["alert"] for rule in rules()]


@pytest.mark.parametrize("fires", [1, 0], ids=["fires", "silent"])
def test_alerts(tmp_path: Path, fires: int) -> None:
    """All that are to fire do, and none that is not."""
    tests = [play(name, wrong if fires else right, fires) for name, (wrong, right) in CASES.items()]
    content = {"rule_files": [str(OBSERVABILITY / "alerts.yml")], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(content), "utf-8")
    command = [str(programs() / "promtool"), "test", "rules", str(tmp_path / "tests.yml")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
