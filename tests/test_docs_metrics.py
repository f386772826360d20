"""docs/metrics.md lists the metrics as they are defined: `python -m tests.test_docs_metrics` writes its tables anew."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import Counter, Gauge, Histogram

from tasks.metrics import gateway, housekeeper, shared, worker
from tasks.metrics.making import INSTRUMENTS, READINGS, Reading

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "metrics.md"
OBSERVABILITY = ROOT / "deploy" / "observability"
BEGIN = "## All metrics\n"
#: The tables of the page: a title for each module of definitions.
TABLES = {"Every process": shared, "The gateway": gateway, "The worker": worker, "The housekeeper": housekeeper}
UNITS = ("_seconds", "_total", "_ratio", "_bytes", "_info")
DIMENSIONLESS = re.compile(
    r"_(requests|in_progress|connections|size|in_use|threads|open|limit|up|tokens|workers|leads|leader|state|held|writes"
    r"|sequences|profiles)$"
)


@dataclass(frozen=True)
class Defined:
    """One metric as it is defined."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...]


def defined(module: Any) -> Iterator[Defined]:
    """Yield the metrics of one module of definitions, in their order."""
    for name, value in vars(module).items():
        if isinstance(value, Reading):
            yield Defined(value.name, "counter" if value.counts else "gauge", value.help, value.labels)
        elif isinstance(value, Counter | Gauge | Histogram) and not name.startswith("_"):
            (metric,) = value.describe()
            yield Defined(
                metric.name + "_total" * (metric.type == "counter"),
                metric.type,
                metric.documentation,
                value._labelnames,
            )


def rules() -> list[dict[str, Any]]:
    """Return the alerting rules."""
    groups = yaml.safe_load((OBSERVABILITY / "alerts.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboards() -> list[dict[str, Any]]:
    """Return the dashboards for Grafana."""
    return [json.loads(path.read_text("utf-8")) for path in sorted((OBSERVABILITY / "grafana").glob("*.json"))]


def expressions() -> list[str]:
    """Return every expression of alerts and dashboards."""
    found = [rule["expr"] for rule in rules()]
    for dashboard in dashboards():
        found += [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return found


def tables() -> str:
    """Return the tables of all metrics, with the alerts that look at each."""
    lines = []
    for title, module in TABLES.items():
        lines += [f"### {title}", "", "| metric | type, labels | what it tells | alerts |", "|---|---|---|---|"]
        for metric in defined(module):
            alerts = [
                f"[{rule['alert'].removeprefix('Metaqore')}](#{rule['alert'].lower()})"
                for rule in rules()
                if re.search(rf"\b{metric.name}(_bucket|_sum|_count)?\b", rule["expr"])
            ]
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            kind = metric.kind + (f": {labels}" if labels else "")
            lines.append(f"| `{metric.name}` | {kind} | {metric.help} | {', '.join(alerts)} |")
        lines.append("")
    return "\n".join(lines)


def whole(page: str) -> str:
    """Return the page with its tables made anew."""
    head, _, rest = page.partition(BEGIN)
    return head + BEGIN + rest.partition("### ")[0] + tables()


def test_the_page_lists_every_metric_as_it_is() -> None:
    """One that was added or changed is on the page."""
    page = PAGE.read_text("utf-8")
    assert page == whole(page), "run `python -m tests.test_docs_metrics`"


def test_every_definition_is_told_by_some_process() -> None:
    """And every process tells what a module of definitions has, and nothing else."""
    told = {
        metric.name + "_total" * (metric.type == "counter")
        for each in INSTRUMENTS.values()
        for metric in each.collect()
    }
    told |= {reading.name for reading in READINGS}
    assert told == {metric.name for module in TABLES.values() for metric in defined(module)}


def test_names_follow_the_conventions() -> None:
    """A prefix, a base unit, `_total` for counters alone, and help that is a sentence."""
    for module in TABLES.values():
        for metric in defined(module):
            assert metric.name.startswith("metaqore_"), metric
            assert (metric.kind == "counter") is metric.name.endswith("_total"), metric
            assert metric.name.endswith(UNITS) or DIMENSIONLESS.search(metric.name), metric
            assert re.fullmatch(r"[A-Z0-9].*\.", metric.help), metric


def test_buckets_grow() -> None:
    """They begin above 0, and each is larger than the one before."""
    for module in TABLES.values():
        for value in vars(module).values():
            if isinstance(value, Histogram):
                bounds = list(value._upper_bounds)
                assert bounds[0] > 0
                assert bounds == sorted(set(bounds))


def test_expressions_name_only_what_there_is() -> None:
    """A metric that was renamed is found in alerts and dashboards."""
    known = {metric.name for module in TABLES.values() for metric in defined(module)}
    known |= {f"{name}{part}" for name in known for part in ("_bucket", "_sum", "_count")}
    used = {name for expression in expressions() for name in re.findall(r"\bmetaqore_\w+", expression)}
    assert used <= known


def test_every_metric_is_shown_or_watched() -> None:
    """What nobody looks at need not be told."""
    used = " ".join(expressions())
    for module in TABLES.values():
        for metric in defined(module):
            assert metric.name in used, metric.name


def test_every_alert_says_what_to_do() -> None:
    """Its runbook is a part of the page that is there, and no part is of an alert that is not."""
    page = PAGE.read_text("utf-8")
    described = re.findall(r"^### (Metaqore\w+)\n\n\S", page, re.MULTILINE)
    assert described == [rule["alert"] for rule in rules()]
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"docs/metrics.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]


def test_dashboards_can_be_imported() -> None:
    """Grafana wants ids that differ and panels that do not overlap; whoever imports one chooses the data source."""
    assert len({dashboard["uid"] for dashboard in dashboards()}) == len(dashboards()) == 2
    for dashboard in dashboards():
        assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource"]
        panels = dashboard["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        places = [panel["gridPos"] for panel in panels]
        cells = [
            (x, y)
            for place in places
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(set(cells)) == len(cells)
        assert max(x for x, _ in cells) < 24
        for panel in panels:
            for target in (panel, *panel.get("targets", ())):
                assert panel["type"] == "row" or target["datasource"]["uid"] == "${datasource}", panel["title"]


if __name__ == "__main__":
    PAGE.write_text(whole(PAGE.read_text("utf-8")), "utf-8")
