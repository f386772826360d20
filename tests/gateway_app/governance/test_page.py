"""docs/governance.md says what the code does: its tables are held against it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tasks.errors import by_code
from tasks.governance.decision import Facts, Found, details
from tasks.governance.secure_gateway import ALIASES, POLICIES
from tasks.schema_governance import DETECTION_MODES
from tasks.settings import GovernanceGroup

PAGE = (Path(__file__).parents[3] / "docs" / "governance.md").read_text("utf-8")


def table(heading: str) -> list[list[str]]:
    """Return the rows of the first table under a heading, without its head."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_policies() -> None:
    """Names, aliases, and what each allows."""
    words = {"local + cloud": {"hmcp_gateway", "ollama", "openrouter"}, "local": {"hmcp_gateway", "ollama"}}
    found = {row[0].strip("`"): row[1:] for row in table("Policies")}
    assert set(found) == set(POLICIES)
    for policy, (aliases, public, internal, sensitive) in found.items():
        assert set(re.findall(r"`(\w+)`", aliases)) == {alias for alias, name in ALIASES.items() if name == policy}
        for said, sensitivity in ((public, "public"), (internal, "internal"), (sensitive, "sensitive")):
            assert POLICIES[policy][sensitivity] == words[said]
        assert POLICIES[policy]["critical"] == POLICIES[policy]["sensitive"]


def test_detection_modes() -> None:
    """All of them, from the least to the most, and the default."""
    rows = table("Detection")
    assert tuple(row[0].strip("`") for row in rows) == DETECTION_MODES
    assert [row[0].strip("`") for row in rows if "default" in row[1]] == [GovernanceGroup().detection]


def test_codes() -> None:
    """Each that a second look ends with is an error's."""
    codes = [row[2].rpartition("`, `")[2].strip("`") for row in table("When a request leaves the queue")]
    assert codes == ["key_revoked", "policy_veto", "policy_veto", "project_unverified"]
    assert all(by_code(code).code == code for code in codes)


@pytest.mark.parametrize("hint", [None, "ollama"])
def test_details(hint: str | None) -> None:
    """What an event can hold is on the page."""
    facts = Facts("coder", "chat", provider_hint=hint, found=Found({"email": 1}, private=True, sensitive=False))
    told = {row[0].strip("`") for row in table("What is recorded")}
    assert set(details(facts, "record", 1)) <= told
    assert told - set(details(facts, "record", 1)) <= {"psmp", "veto", "vetoed_by", "provider_hint"}
