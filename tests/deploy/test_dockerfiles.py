"""The Dockerfiles: what they copy is there and let through, and nothing runs as root or carries a secret."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tasks.settings import SECRET_NAMES
from tests.deploy.manifests import DEPLOY, ROOT

FILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions with their arguments, continued lines joined."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined.splitlines()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_goes_to_the_builder(path: Path) -> None:
    """It is in the repository, and .dockerignore lets it through, which lets nothing through by itself."""
    ignored, *let_through = [
        line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line and not line.startswith("#")
    ]
    assert ignored == "*"
    copied = [
        source
        for name, arguments in instructions(path)
        if name == "COPY" and not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source == "." or f"!{source}" in let_through
    assert not any(fnmatch(name.lstrip("!"), "*secret*") or "var" in name for name in let_through)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_last_stage_is_nobody_in_particular(path: Path) -> None:
    """Its user is a number, so that Kubernetes can tell that it is not root; process 1 passes signals on."""
    found = instructions(path)
    last = [index for index, (name, _) in enumerate(found) if name == "FROM"][-1]
    stage = found[last:]
    assert [arguments for name, arguments in stage if name == "USER"] == ["10001:10001"]
    assert ("ENTRYPOINT", '["/usr/bin/tini", "--"]') in stage
    assert stage.index(("USER", "10001:10001")) < [name for name, _ in stage].index("ENTRYPOINT")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_is_built_in(path: Path) -> None:
    """Only the folder is named where they will be mounted."""
    text = path.read_text("utf-8").lower()
    assert not any(name in text for name in (*SECRET_NAMES, "password", "redis_url", "database_url"))
