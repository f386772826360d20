"""A running MetaQore server, asked how projects stand. docs/metaqore.md tells it from outside."""

from __future__ import annotations

from tasks.governance.psmp import Projects
from tasks.settings import Settings

__all__ = ["make_projects"]


def make_projects(settings: Settings) -> Projects | None:
    """Return what tells how projects stand, or None if no MetaQore is configured. Nothing is connected yet.

    Raises ConfigurationError if the API key cannot be read.
    """
    if settings.metaqore.url is None:
        return None
    # The HTTP client takes a while to import, and most gateways need none.
    from tasks.governance.metaqore.projects import LiveProjects

    return LiveProjects(settings.metaqore, settings.secrets.metaqore_key())
