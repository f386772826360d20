"""This host: Python and packages, open files, and where the gateway listens."""

from __future__ import annotations

import importlib.metadata
import resource
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from gateway_app.doctor.finding import Finding, fail, ok, unknown, warn
from tasks.settings import Settings

DISTRIBUTION = "metaqore-gateway"
#: What a gateway asks for at its start; each stream takes one.
OPEN_FILES = 10_240
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at what needs no service."""
    yield from examine_runtime()
    yield _listens(settings)


def examine_runtime() -> Iterator[Finding]:
    """Look at what needs no configuration either."""
    yield _python()
    yield _packages()
    yield _open_files()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    try:
        wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        return unknown("python", f"{DISTRIBUTION} is not installed as a package", "pip install -e .")
    if SpecifierSet(wanted or "").contains(version):
        return ok("python", f"Python {version}")
    return fail("python", f"Python {version} is not within {wanted}", "install Python 3.12 and make a new environment")


def _packages() -> Finding:
    try:
        declared = map(Requirement, importlib.metadata.requires(DISTRIBUTION) or ())
    except importlib.metadata.PackageNotFoundError:
        return unknown("packages", f"{DISTRIBUTION} is not installed as a package", "pip install -e .")
    needed = [one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [problem for one in needed if (problem := _problem(one))]
    if not wrong:
        return ok("packages", f"all {len(needed)} packages are within their ranges")
    return fail("packages", "; ".join(wrong), "pip install -c requirements/constraints.txt -e .")


def _problem(requirement: Requirement) -> str | None:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {version} is not within {requirement.specifier}"


def _open_files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= OPEN_FILES:
        return ok("open files", f"the hard limit is {'none' if hard == resource.RLIM_INFINITY else format(hard, ',')}")
    return warn(
        "open files",
        f"a process may open {hard:,} files, and a gateway with a thousand streams wants {OPEN_FILES:,}",
        f"LimitNOFILE={OPEN_FILES} in systemd's unit, or ulimit -n {OPEN_FILES}",
    )


def _listens(settings: Settings) -> Finding:
    host, port = settings.gateway.host, settings.gateway.port
    if host in LOOPBACK:
        return ok("listening", f"on {host}:{port}, for this host only")
    return warn(
        "listening",
        f"on {host}:{port}, in plain HTTP for whoever reaches it: a proxy with TLS belongs before it",
        "METAQORE_GATEWAY__HOST=127.0.0.1, with the proxy on this host",
    )
