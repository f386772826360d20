"""`flask profiles`: an organization's profiles out to files and in again."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
import yaml
from click.testing import CliRunner, Result
from flask.testing import FlaskClient

from gateway_app.profiles.cli import profiles
from tasks.schema_profiles import agents, profile_versions
from tests.conftest import new_key
from tests.profile_calls import add, base, change, connected, create, draft, read

SHIPPED = ("contract-validator", "engineering-base", "incident-responder", "migration-planner")


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return one kind of database: the statements are those of the routes, which are tried on both."""
    kind: str = request.param
    return kind


def command(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(profiles, list(map(str, arguments)))


def made(*arguments: object) -> str:
    """Run a command that must succeed; return what it printed."""
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_from_one_organization_to_another(client: FlaskClient, tmp_path: Path) -> None:
    """All active versions, a file each; imported elsewhere they are drafts with the same text, bases first."""
    base(client, "zz-house", "House.")
    draft(client, "poet", "zz-house", "Poet: one.\nTwo.", activate=True, description="Writes.")
    create(client, "né w %", activate=True)
    add(client, "né w %", "Draft that is not taken along.")
    create(client, "gone", activate=True)
    change(client, "gone", "retire")
    create(client, "draft")
    made("export", "--output", tmp_path)
    found = {path: yaml.safe_load(path.read_text("utf-8")) for path in tmp_path.glob("*.yaml")}
    assert {one["agent"] for one in found.values()} == {*SHIPPED, "zz-house", "poet", "né w %"}
    printed = made("export", "--agent", "poet")
    assert printed == (tmp_path / "poet.yaml").read_text("utf-8")
    own = sorted(path for path, one in found.items() if one["agent"] not in SHIPPED)
    dry = made("import", "--organization", "other", "--dry-run", *own)
    assert dry.count("a new agent\n") == 3
    assert dry.index("zz-house") < dry.index("poet")
    others = agents.c.organization == "other"
    assert read(sa.select(agents).where(others)) == []
    shown = made("import", "--organization", "other", "--author", "Ada", "--reason", "Moved.", *own)
    assert "poet: a new agent, draft 1\n" in shown
    rows = read(sa.select(profile_versions).where(profile_versions.c.organization == "other"))
    assert {(row.created_by, row.author, row.reason, row.activated_at) for row in rows} == {
        ("cli", "Ada", "Moved.", None)
    }
    stranger = connected(client.application, new_key("other"))
    theirs = stranger.get("/v1/profiles/poet/versions/1").json
    assert theirs["segments"] == client.get("/v1/profiles/poet/versions/1").json["segments"]
    assert "as version 1: nothing to add" in made("import", "--organization", "other", tmp_path / "poet.yaml")
    changed = (tmp_path / "poet.yaml").read_text("utf-8").replace("Two.", "Three.")
    (tmp_path / "poet.yaml").write_text(changed, "utf-8")
    dry = made("import", "--organization", "other", "--dry-run", tmp_path / "poet.yaml")
    assert "poet: another version\n" in dry
    assert "-Two.\n" in dry
    assert "+Three.\n" in dry
    assert "draft 2" in made("import", "--organization", "other", tmp_path / "poet.yaml")


def test_mistakes(client: FlaskClient, tmp_path: Path) -> None:
    """Each is one message that names the file; nothing is imported, not even what could be."""
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("agent: a\nversion: 1\nsegments: [{kind: role, text: x}]\n", "utf-8")
    for content, told in (
        ("agent: &x a", "anchors and aliases"),
        ("agent: a", "segments: Field required"),
        ("#" * (2**20 + 1), "larger than"),
        (good.read_text("utf-8"), "same agent"),
    ):
        bad.write_text(content, "utf-8")
        result = command("import", good, bad)
        assert result.exit_code == 1
        assert told in result.output, result.output
    assert read(sa.select(agents)) == []
    bad.write_text(good.read_text("utf-8").replace("agent: a", "agent: b\nextends: nobody"), "utf-8")
    assert "no agent named 'nobody'" in command("import", bad).output
    assert command("import", "--reason", "a\nb", good).exit_code == 2
    assert command("export").exit_code == 2
    assert command("export", "--agent", "nobody").exit_code == 1


def test_bases_that_extend_each_other(client: FlaskClient, tmp_path: Path) -> None:
    """They can be drafted; that it is a circle is said where one is first used."""
    for name, above in (("a", "b"), ("b", "a")):
        text = f"agent: {name}\nversion: 1\nextends: {above}\nsegments: [{{kind: role, text: x}}]\n"
        (tmp_path / f"{name}.yaml").write_text(text, "utf-8")
    made("import", *sorted(tmp_path.glob("*.yaml")))
    assert change(client, "a", "activate", version=1).json["code"] == "base_unusable"
