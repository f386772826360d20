"""An organization's own profiles: the versions that its requests got, of its own agents and of shipped ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gateway_app.kv_cache import stored
from gateway_app.kv_cache.stored import Stored
from gateway_app.profiles import Profiles
from tasks.db import Database
from tasks.schema_profiles import profile_versions

#: What is written of a Place.
PLACE = r"^\d{1,9}f?:[^\x00-\x1f\x7f]{1,200}$"


class Place(NamedTuple):
    """Where a version comes in the order of the lists; a shipped one after an own one of the same number.

    As text, it says after what the next page begins.
    """

    agent: str
    version: int
    is_file: bool = False

    def __str__(self) -> str:
        return f"{self.version}{'f' if self.is_file else ''}:{self.agent}"

    @classmethod
    def parse(cls, text: str) -> Place:
        """Return the place that was written."""
        version, _, agent = text.partition(":")
        return cls(agent, int(version.removesuffix("f")), version.endswith("f"))


class OwnProfiles:
    """Finds them by keys that begin with the organization, so that it takes as long however many others have."""

    def __init__(self, database: Database, profiles: Profiles) -> None:
        self._database = database
        self._profiles = profiles

    def page(
        self, organization: str, agent: str | None, after: Place | None, limit: int
    ) -> tuple[list[Stored], Place | None]:
        """Return up to `limit` profiles, by agent and version, and the last one's place if there are more."""
        base = self._profiles.prefixes.base(organization)

        def read(connection: Connection) -> list[tuple[Place, Stored]]:
            own = dict(_versions(connection, organization, base, agent, after, limit + 1))
            files = dict(self._files(organization, agent, after))
            places = own | files
            found = {each.static_profile_hash: each for each in stored.find(connection, [*places.values()])}
            # A file that no request of the organization got yet is not stored.
            return [(place, found[places[place]]) for place in sorted(places) if places[place] in found]

        there = self._database.read(read)
        shown = [replace(each, agent=place.agent, version=place.version) for place, each in there[:limit]]
        return shown, there[limit - 1][0] if len(there) > limit else None

    def _files(self, organization: str, agent: str | None, after: Place | None) -> Iterator[tuple[Place, str]]:
        for name, profile in self._profiles.shipped.items():
            place = Place(name, profile.version, is_file=True)
            if agent in (None, name) and (after is None or place > after):
                yield place, self._profiles.name_shipped(organization, name).static_profile_hash


def _versions(
    connection: Connection, organization: str, base: str, agent: str | None, after: Place | None, limit: int
) -> Iterator[tuple[Place, str]]:
    """Return the organization's own versions that were tokenised for the model that is served."""
    table = profile_versions.c
    query = sa.select(table.agent_name, table.version, table.static_profile_hash).where(
        table.organization == organization, table.prefix_base == base, table.static_token_count > 0
    )
    if agent is not None:
        query = query.where(table.agent_name == agent)
    if after is not None:
        query = query.where(sa.tuple_(table.agent_name, table.version) > (after.agent, after.version))
    for row in connection.execute(query.order_by(table.agent_name, table.version).limit(limit)):
        yield Place(row.agent_name, row.version), row.static_profile_hash
