"""A real Prometheus scrapes a real gateway, worker and housekeeper, and answers what dashboards and alerts ask it."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from http import HTTPMethod, HTTPStatus
from pathlib import Path
from typing import get_args

import pytest
import requests
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from gateway_app.governance.api_keys import ApiKeys
from gateway_app.metrics.http import UNMATCHED
from gateway_app.metrics.queue import WORKER_STATES
from tasks.db import Database
from tasks.job import Priority
from tasks.metrics.making import ALL
from tasks.metrics.shared import CODES, OTHER
from tasks.prompts.radix import Tier
from tasks.schema import KINDS, TERMINAL_STATES
from tasks.settings import PREFIX, DatabaseGroup, SecretsGroup
from tests.conforming import BY_ROUTE
from tests.local_gateway import ROOT, LocalGateway
from tests.services import free_port, wait_until
from tests.services.prometheus_server import PrometheusServer, programs

OBSERVABILITY = ROOT / "deploy" / "observability"
SCRAPE_S = 0.5
#: Scrapes that a rate needs at least, and a few more.
SCRAPES = 4
PATIENCE_S = 60.0
#: Stands for everything that a client may send, and that no metric may show.
CANARY = "canary-7d1f"
#: The sets that labels take their values from, by name; those of `state` are of several metrics.
CLOSED: dict[str, set[str]] = {
    "kind": set(KINDS),
    "code": {*CODES, OTHER},
    "reason": {"away", "undecided"},
    "process": set(ALL),
    "method": {*HTTPMethod, OTHER},
    "route": {path for _method, path in BY_ROUTE} | {UNMATCHED},
    "status": {str(status.value) for status in HTTPStatus},
    "priority": set(get_args(Priority)),
    "cache": {"hit", "miss", "expected", "found"},
    "found": {"as_expected", "less", "more"},
    "source": {"computed", "cached"},
    "what": {"requests", "tokens"},
    "tier": {tier.name.lower() for tier in Tier},
    "part": {"capacity", "known", "free"},
    "outcome": {"led", "stood_by", "queue_away", "database_away", "failed", "warmed", "not_kept"},
    "state": {*WORKER_STATES, *TERMINAL_STATES, "in_use", "idle", "running", "waiting", "queued"},
}
#: Values of these are numbers or the release's, and so no client's.
FORMS = {"le": r"[0-9.e+-]+|\+Inf", "version": r"[0-9a-z.+-]+", "python": r"3\.\d+\.\d+"}


@dataclass
class Watched:
    """A gateway in whose processes much has happened, and the Prometheus that watched."""

    gateway: LocalGateway
    prometheus: PrometheusServer
    urls: dict[str, str]

    def metrics(self, job: str) -> list[Metric]:
        """Return what a process tells now."""
        return list(text_string_to_metric_families(requests.get(self.urls[job], timeout=30).text))

    def series(self, job: str) -> int:
        """Return of how many series that is."""
        return sum(len(metric.samples) for metric in self.metrics(job))


def key(gateway: LocalGateway, organization: str) -> str:
    """Return a key of an organization."""
    database = Database(DatabaseGroup(url=f"sqlite:///{gateway.folder.path / 'gateway.db'}"))
    try:
        secrets = SecretsGroup(directory=gateway.folder.secrets).keys("key_pepper")
        return ApiKeys(database, secrets).create(organization, "test")[1]
    finally:
        database.close()


def ask(gateway: LocalGateway, number: int, bearer: str) -> None:
    """Send what a client sends, good and bad, with a canary wherever a client may put text."""
    headers = {"Authorization": f"Bearer {bearer}"}
    text = f"{CANARY} {number}"

    def send(method: str, path: str, body: object = None, **more: str) -> requests.Response:
        return requests.request(method, gateway.url + path, json=body, headers=headers | more, timeout=30)

    chat = {"model": "incident-responder", "messages": [{"role": "user", "content": text}], "max_tokens": 30}
    priority = get_args(Priority)[number % 3]
    assert send("POST", "/v1/chat/completions", chat | {"stream": number % 2 == 0}).ok
    task = {"agent": "incident-responder", "directive": text, "priority": priority, "sampling": {"max_tokens": 20}}
    path = send("POST", "/v1/tasks", task | {"metadata": {CANARY: text}}, **{"Idempotency-Key": text}).json()["links"]
    assert "event: completed" in send("GET", path["events"]).text
    send("DELETE", path["self"])
    send("POST", "/v1/tasks", task | {"agent": f"{CANARY}-{number}"})
    send("POST", "/v1/tasks", task | {"provider_hint": "openrouter", "has_sensitive_data": True})
    send("POST", "/v1/tasks", {CANARY: number})
    send("GET", f"/{CANARY}/{number}?{CANARY}={number}")
    send("GET", f"/v1/tasks/{CANARY}-{number}")
    send(f"X{CANARY.upper()}{number}", "/v1/tasks")
    send("GET", "/v1/models", Authorization=f"Bearer {CANARY}")
    send("GET", "/v1/tasks/none/stream", Upgrade=CANARY)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Watched]:
    """Return a gateway that `bin/run` started, and a Prometheus that has scraped it while requests came."""
    programs()
    gateway = LocalGateway(tmp_path_factory.mktemp("observability") / "gateway", tiny_model)
    with ExitStack() as stack:
        stack.callback(gateway.kill_everything)
        # Not the usual ports, which tests beside this one may take as well.
        ports = {f"{PREFIX}METRICS__{process}_PORT": str(free_port()) for process in ("WORKER", "HOUSEKEEPER")}
        # Nothing is to be tried again, however busy the machine is.
        gateway.start_ready(**ports, **{f"{PREFIX}SCHEDULING__LEASE_S": "60"})
        found = re.search(r"^  metrics +(\S+), (\S+), (\S+)$", gateway.output, re.MULTILINE)
        assert found, gateway.output
        urls = dict(zip(("metaqore-gateway", "metaqore-worker", "metaqore-housekeeper"), found.groups(), strict=True))
        prometheus = PrometheusServer(configuration(urls))
        stack.callback(prometheus.close)
        prometheus.start()
        bearer = gateway.folder.api_key.read_text().strip()
        scraped = f"min(count_over_time(up[{PATIENCE_S:.0f}s]))"
        until = time.monotonic() + PATIENCE_S
        number = 0
        while [float(each["value"][1]) >= SCRAPES for each in prometheus.query(scraped)] != [True] or number < SCRAPES:
            assert time.monotonic() < until, "Prometheus did not scrape"
            ask(gateway, number, bearer)
            number += 1
        yield Watched(gateway, prometheus, urls)


def configuration(urls: dict[str, str]) -> dict[str, object]:
    """Return the configuration that ships, for these processes, and scraping as fast as a test wants."""
    shipped: dict[str, object] = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text("utf-8"))
    jobs = shipped["scrape_configs"]
    assert isinstance(jobs, list)
    assert [job["job_name"] for job in jobs] == list(urls)
    for job in jobs:
        job["static_configs"] = [{"targets": [urls[job["job_name"]].split("/")[2]]}]
    often = f"{SCRAPE_S * 1000:.0f}ms"
    shipped["global"] = {"scrape_interval": often, "scrape_timeout": often, "evaluation_interval": often}
    shipped["rule_files"] = [str(OBSERVABILITY / "alerts.yml")]
    del shipped["alerting"]
    return shipped


def panels() -> list[tuple[str, str]]:
    """Return the title of a panel and a query of it, for all queries of all dashboards."""
    found = []
    for path in sorted((OBSERVABILITY / "grafana").glob("*.json")):
        for panel in json.loads(path.read_text("utf-8"))["panels"]:
            found += [(panel["title"], target["expr"]) for target in panel.get("targets", ())]
    return found


def test_every_query_of_the_dashboards_has_data(watched: Watched) -> None:
    """All of them: what is rare is told as 0 from the start."""
    assert len(panels()) > 60
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda each: watched.prometheus.query(each[1].replace("$__rate_interval", "1m")), panels())
    for (title, expression), series in zip(panels(), answers, strict=True):
        assert series, f"{title}: {expression}"
        assert any(each["value"][1] != "NaN" for each in series), f"{title}: {expression}"


def test_a_healthy_gateway_raises_no_alert(watched: Watched) -> None:
    """Every rule is evaluated without an error, and none fires."""
    wait_until(
        lambda: all(rule["health"] != "unknown" for rule in alerts(watched)), PATIENCE_S, "rules that are evaluated"
    )
    assert {rule["name"]: rule.get("lastError") for rule in alerts(watched) if rule["health"] != "ok"} == {}
    assert [rule["name"] for rule in alerts(watched) if rule["state"] == "firing"] == []


def alerts(watched: Watched) -> list[dict[str, str]]:
    """Return the rules as Prometheus has them."""
    return [rule for group in watched.prometheus.ask("rules")["groups"] for rule in group["rules"]]


def test_figures_are_those_of_the_requests(watched: Watched) -> None:
    """What was asked for, and what the record says of it, is what is counted, in each process what it did."""
    gateway, worker = ({m.name: m for m in watched.metrics(f"metaqore-{job}")} for job in ("gateway", "worker"))
    with_status = {
        (sample.labels["route"], sample.labels["status"]): sample.value
        for sample in gateway["metaqore_http_requests"].samples
    }
    asked = with_status["/v1/chat/completions", "200"]
    assert asked >= SCRAPES
    assert with_status["/v1/tasks", "403"] == asked
    assert with_status["unmatched", "404"] == asked
    completed = 2 * asked
    assert total(worker["metaqore_audit_events"], kind="completed") == completed
    assert total(gateway["metaqore_audit_events"], kind="admitted") == completed
    assert total(gateway["metaqore_audit_events"], kind="vetoed") == asked
    prompt, cached, output = recorded_tokens(watched.gateway)
    assert total(worker["metaqore_output_tokens"]) == output
    assert total(worker["metaqore_prompt_tokens"], source="cached") == cached
    assert total(worker["metaqore_prompt_tokens"]) == prompt
    first = [sample for sample in worker["metaqore_first_token_seconds"].samples if sample.name.endswith("_count")]
    assert sum(sample.value for sample in first) == completed


def recorded_tokens(gateway: LocalGateway) -> tuple[int, int, int]:
    """Return how many prompt tokens, cached ones, and output tokens the audit trail has."""
    query = (
        "SELECT sum(prompt_tokens), sum(cached_tokens), sum(output_tokens) FROM audit_events WHERE kind = 'completed'"
    )
    with closing(sqlite3.connect(gateway.folder.path / "gateway.db", timeout=30)) as database:
        (sums,) = database.execute(query)
    return tuple(sums)


def total(metric: Metric, **labels: str) -> float:
    """Return the sum of a metric's samples with these labels."""
    return sum(sample.value for sample in metric.samples if labels.items() <= sample.labels.items())


@pytest.mark.parametrize("job", ["metaqore-gateway", "metaqore-worker", "metaqore-housekeeper"])
def test_labels_are_of_closed_sets(watched: Watched, job: str) -> None:
    """None is anything that a client sent, whatever it was."""
    metrics = watched.metrics(job)
    assert any(metric.name == "metaqore_build_info" for metric in metrics)
    for sample in (sample for metric in metrics for sample in metric.samples):
        for label, value in sample.labels.items():
            if label in FORMS:
                assert re.fullmatch(FORMS[label], value), sample
            else:
                assert value in CLOSED[label], sample
    assert CANARY not in requests.get(watched.urls[job], timeout=30).text.lower()


def test_the_number_of_series_does_not_grow_with_use(watched: Watched) -> None:
    """Other organizations, agents, paths, methods and texts make no series."""
    before = {job: watched.series(job) for job in watched.urls}
    for number in range(100, 106):
        ask(watched.gateway, number, key(watched.gateway, f"{CANARY} {number}"))
    assert {job: watched.series(job) for job in watched.urls} == before
    assert max(before.values()) < 1200


@pytest.mark.parametrize("job", ["metaqore-gateway", "metaqore-worker", "metaqore-housekeeper"])
def test_promtool_finds_nothing_to_improve(watched: Watched, job: str) -> None:
    """It knows the conventions for names, types and units."""
    text = requests.get(watched.urls[job], timeout=30).content
    checked = subprocess.run(
        [str(programs() / "promtool"), "check", "metrics"], input=text, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_promtool_accepts_what_ships() -> None:
    """The configuration, and the rules that it names."""
    command = [str(programs() / "promtool"), "check", "config", str(OBSERVABILITY / "prometheus.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "rules found" in checked.stdout
