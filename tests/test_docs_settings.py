"""docs/settings.md is made from the settings themselves: `python -m tests.test_docs_settings` writes it anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tasks.settings import CACHE_HOME, Settings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
BEGIN = "## gateway\n"
SECRETS = "## secrets\n"


def tables() -> str:
    """Return the tables of all groups but the secrets, whose part of the page is written by hand."""
    return "\n".join(
        _table(name, field.annotation)
        for name, field in Settings.model_fields.items()
        if name != "secrets" and isinstance(field.annotation, type)
    )


def _table(name: str, group: type[BaseModel]) -> str:
    rows = _rows(group)
    return "\n".join(
        [f"## {name}", "", str(group.__doc__).strip(), "", "| key | default | |", "|---|---|---|", *rows, ""]
    )


def _rows(group: type[BaseModel], prefix: str = "") -> list[str]:
    """Return a row for each key; keys of a group inside the group follow, with its name before them."""
    rows: list[str] = []
    for name, field in group.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += _rows(field.annotation, f"{prefix}{name}.")
            continue
        value = _shown(field.get_default(call_default_factory=True, validated_data={}))
        rows.append(f"| `{prefix}{name}` | {value} | {field.description or ''} |")
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return ""
    text = str(value) if isinstance(value, str | Path) else json.dumps(value)
    return f"`{text.replace(str(CACHE_HOME), '~/.cache/metaqore-gateway')}`"


def whole(page: str) -> str:
    """Return the page with its tables made anew."""
    return page[: page.index(BEGIN)] + tables() + "\n" + page[page.index(SECRETS) :]


def test_the_page_shows_every_setting_as_it_is() -> None:
    """A setting that was added or changed is on the page."""
    page = PAGE.read_text("utf-8")
    assert page == whole(page), "run `python -m tests.test_docs_settings`"


if __name__ == "__main__":
    PAGE.write_text(whole(PAGE.read_text("utf-8")), "utf-8")
