"""The manifests for Kubernetes: valid by schema, true to each other, to the settings and to the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import jsonschema_rs
import kubernetes_validate
import pytest

from tasks.metrics.gateway import QUEUE_LEASED, QUEUE_TOKENS
from tasks.settings import SECRET_NAMES, Settings
from tests.deploy.manifests import DEPLOY, EXAMPLES, SPARE_S, documents, objects, settings_of

ALL = [(file, document) for file, document in objects() if file != "kustomization.yaml"]
WORKLOADS = {document["metadata"]["name"]: document for _, document in ALL if "template" in document.get("spec", {})}
#: The oldest and the newest release whose schemas they are held against.
RELEASES = ("1.30", "1.37")


def closed(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


INTEGER, STRING = {"type": "integer"}, {"type": "string"}
BEHAVIOR = closed(
    stabilizationWindowSeconds=INTEGER,
    policies={
        "type": "array",
        "items": closed(("type", "value", "periodSeconds"), type=STRING, value=INTEGER, periodSeconds=INTEGER),
    },
)
#: Of the operators' own kinds, the fields that are used here, as their documents describe them.
SPECS = {
    "ScaledObject": closed(
        ("scaleTargetRef", "triggers"),
        scaleTargetRef=closed(("name",), name=STRING),
        pollingInterval=INTEGER,
        minReplicaCount=INTEGER,
        maxReplicaCount=INTEGER,
        fallback=closed(("failureThreshold", "replicas"), failureThreshold=INTEGER, replicas=INTEGER),
        advanced=closed(horizontalPodAutoscalerConfig=closed(behavior=closed(scaleUp=BEHAVIOR, scaleDown=BEHAVIOR))),
        triggers={
            "type": "array",
            "items": closed(
                ("type", "metadata"),
                type={"const": "prometheus"},
                metricType={"enum": ["AverageValue", "Value"]},
                metadata=closed(
                    ("serverAddress", "query", "threshold"),
                    serverAddress=STRING,
                    query=STRING,
                    threshold=STRING,
                    ignoreNullValues=STRING,
                ),
            ),
        },
    ),
    "PodMonitor": closed(
        ("selector", "podMetricsEndpoints"),
        selector={"type": "object"},
        podMetricsEndpoints={"type": "array", "items": closed(port=STRING, path=STRING, interval=STRING)},
    ),
}


def named(kind: str, name: str) -> dict[str, Any]:
    """Return the object of that kind and name."""
    (found,) = [each for _, each in ALL if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pod(name: str) -> dict[str, Any]:
    """Return the pods' specification of a workload."""
    spec: dict[str, Any] = WORKLOADS[name]["spec"]["template"]["spec"]
    return spec


def containers(name: str) -> Iterator[dict[str, Any]]:
    """Give all containers of a workload's pods, those that run before the others first."""
    yield from pod(name).get("initContainers", ())
    yield from pod(name)["containers"]


def variables(container: dict[str, Any]) -> dict[str, str]:
    """Return the environment of a container; a secret's values are empty."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            found |= named("ConfigMap", source["configMapRef"]["name"])["data"]
        else:
            found |= named("Secret", source["secretRef"]["name"])["stringData"]
    return found


def settings_in(name: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return the settings of a workload's process."""
    return settings_of(variables(pod(name)["containers"][0]), monkeypatch)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(("file", "document"), ALL, ids=[f"{f}-{d['kind']}" for f, d in ALL])
def test_schema(file: str, document: dict[str, Any], release: str) -> None:
    """Kubernetes would take it as it stands, with no field that it does not know."""
    del file
    if document["kind"] in SPECS:
        jsonschema_rs.validator_for(SPECS[document["kind"]]).validate(document["spec"])
    else:
        kubernetes_validate.validate(document, release, strict=True)


def test_everything_is_listed() -> None:
    """`kubectl apply -k` applies every file but the example of secrets."""
    (listed,) = documents(DEPLOY / "kubernetes" / "kustomization.yaml")
    assert sorted(listed["resources"]) == sorted({file for file, _ in ALL} - {"secrets.example.yaml"})
    assert {image["name"] for image in listed["images"]} == {
        each["image"] for name in WORKLOADS for each in containers(name)
    }


@pytest.mark.parametrize("name", WORKLOADS)
def test_settings_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each container's environment holds names and values that the settings accept."""
    for container in containers(name):
        settings = settings_of(variables(container), monkeypatch)
        assert settings.gateway.request_queue_url == EXAMPLES["REDIS_URL"]


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_variable_comes_by_itself(name: str) -> None:
    """Kubernetes tells every pod of every service, in variables named after it; ours would be taken for misspelt settings."""
    assert pod(name)["enableServiceLinks"] is False


@pytest.mark.parametrize("name", WORKLOADS)
def test_what_it_names_is_there(name: str) -> None:
    """Secrets, claims and mounts; the label that its selector, its budget and its policies go by."""
    volumes = {volume["name"]: volume for volume in pod(name)["volumes"]}
    for container in containers(name):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
    for volume in volumes.values():
        if "secret" in volume:
            secret = named("Secret", volume["secret"]["secretName"])
            assert set(SECRET_NAMES) == secret["stringData"].keys()
            assert not any(secret["stringData"].values()), "an example with a value would be used as it is"
        if "persistentVolumeClaim" in volume:
            named("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
    labels = WORKLOADS[name]["spec"]["template"]["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/component": name.removeprefix("metaqore-")}
    assert WORKLOADS[name]["spec"].get("selector", {"matchLabels": labels})["matchLabels"] == labels


@pytest.mark.parametrize("name", WORKLOADS)
def test_pods_are_restricted(name: str) -> None:
    """As the namespace's label demands, and with a root file system that nobody writes to."""
    assert pod(name)["securityContext"]["runAsNonRoot"] is True
    assert pod(name)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod(name)["automountServiceAccountToken"] is False
    for container in containers(name):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]


def test_ports_are_those_that_processes_listen_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the settings that they are given; probes, the service and the policies name them."""
    ports = {
        name: {port["name"]: port["containerPort"] for port in pod(name)["containers"][0].get("ports", ())}
        for name in WORKLOADS
    }
    settings = settings_in("metaqore-gateway", monkeypatch)
    assert ports == {
        "metaqore-gateway": {"http": settings.gateway.port, "metrics": settings.metrics.gateway_port},
        "metaqore-worker": {"metrics": settings.metrics.worker_port},
        "metaqore-housekeeping": {"metrics": settings.metrics.housekeeper_port},
        "metaqore-flower": {},
        "metaqore-release": {},
    }
    assert settings.metrics.host == settings.gateway.host == "0.0.0.0"
    known = {port for each in ports.values() for port in each}
    assert named("Service", "metaqore-gateway")["spec"]["ports"][0]["targetPort"] == "http"
    assert {end["port"] for end in named("PodMonitor", "metaqore")["spec"]["podMetricsEndpoints"]} == {"metrics"}
    for _, policy in ALL:
        if policy["kind"] == "NetworkPolicy":
            for rule in policy["spec"].get("ingress", ()):
                assert {port["port"] for port in rule["ports"]} <= known


@pytest.mark.parametrize("name", ["metaqore-gateway", "metaqore-worker", "metaqore-housekeeping"])
def test_probes(name: str) -> None:
    """A gateway's are routes of its own; the others' are what the metrics' server answers (see its tests)."""
    (container,) = pod(name)["containers"]
    probes = {
        kind: container[f"{kind}Probe"]["httpGet"]
        for kind in ("startup", "liveness", "readiness")
        if f"{kind}Probe" in container
    }
    health = {"path": "/healthz", "port": "http" if name == "metaqore-gateway" else "metrics"}
    assert probes == {"startup": health, "liveness": health} | (
        {"readiness": {"path": "/readyz", "port": "http"}} if name == "metaqore-gateway" else {}
    )


def test_grace_periods_outlast_the_processes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is killed that is still ending in order."""
    gateway = pod("metaqore-gateway")
    sleep_s = int(gateway["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    graceful_s = import_module("gateway_app.gunicorn").graceful_timeout
    assert gateway["terminationGracePeriodSeconds"] >= sleep_s + graceful_s + SPARE_S
    drain_s = settings_in("metaqore-worker", monkeypatch).scheduling.drain_s
    assert pod("metaqore-worker")["terminationGracePeriodSeconds"] >= drain_s + 2 * SPARE_S
    assert pod("metaqore-housekeeping")["terminationGracePeriodSeconds"] >= 2 * SPARE_S


def test_what_scales_is_there_and_has_one_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoscaler and `replicas` in the same file would undo each other at every `kubectl apply`."""
    scaled = {named("HorizontalPodAutoscaler", "metaqore-gateway")["spec"]["scaleTargetRef"]["name"]}
    workers = named("ScaledObject", "metaqore-worker")["spec"]
    scaled.add(workers["scaleTargetRef"]["name"])
    assert {name for name in WORKLOADS if "replicas" not in WORKLOADS[name]["spec"]} == scaled | {"metaqore-release"}
    (trigger,) = workers["triggers"]
    query = trigger["metadata"]["query"]
    assert set(re.findall(r"metaqore_\w+", query)) == {QUEUE_TOKENS.name, QUEUE_LEASED.name}
    room = settings_in("metaqore-worker", monkeypatch).engine.max_num_seqs
    assert query.endswith(f"/ {room}")
    budgets = {each["metadata"]["name"] for _, each in ALL if each["kind"] == "PodDisruptionBudget"}
    assert budgets == {"metaqore-gateway", "metaqore-housekeeping", "metaqore-worker"}
