"""What changes an organization's agents: each change is one transaction.

Numbers count up from the newest version there is, the shipped file's included. The agent's row is locked while a
number is given out, so that two versions posted at once get two numbers; whoever says which version theirs builds on
is refused if there is a newer one.

What refuses a change is returned by the transaction and raised outside it: raising inside would make the writer run
whatever was to be committed with it again, one by one (docs/decisions/0002).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import Connection

from gateway_app.profiles import rows
from gateway_app.profiles.rows import Tokenised
from gateway_app.profiles.sealing import VersionSealer
from tasks.crypto import KeyWrapper
from tasks.db import Database
from tasks.errors import GatewayError, ProfileExists, ProfileLimit, VersionConflict
from tasks.prompts.profile import Profile
from tasks.schema import profiles

#: Of one organization, so that nobody fills the database for all.
MAX_AGENTS = 1000
MAX_VERSIONS = 1000


@dataclass(frozen=True, slots=True)
class Activation:
    """What a version brings along that is active from its start: what tokenising gave, and the workers' row of it."""

    tokenised: Tokenised
    worker_row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the caller of a change believes the agent to be like; None where it does not say."""

    newest_version: int | None = None
    states: frozenset[str] | None = None

    def fits(self, newest: int, active: int) -> bool:
        """Tell whether the agent is as expected."""
        return self.newest_version in (None, newest) and (self.states is None or state(newest, active) in self.states)


def state(newest: int, active: int) -> str:
    """Return what names an agent's state, as an entity tag: each new version and each activation changes it."""
    return f"{newest}.{active}"


class ProfileChanges:
    """Makes changes. `by` is the id of the API key that asked for one."""

    def __init__(self, database: Database, keys: KeyWrapper) -> None:
        self._database = database
        self._sealer = VersionSealer(keys)

    def create(self, organization: str, by: str, profile: Profile, activation: Activation | None) -> None:
        """Store an agent that there is none of yet, with its first version. Raises ProfileExists, ProfileLimit."""

        def work(connection: Connection) -> GatewayError | None:
            if full := _full(connection, organization):
                return full
            if not rows.insert_agent(connection, organization, profile.agent):
                return ProfileExists(f"there is already an agent named {profile.agent!r}")
            self._append(connection, organization, by, profile, activation)
            return None

        if (refusal := self._database.write(work)) is not None:
            raise refusal

    def add(
        self,
        organization: str,
        by: str,
        profile: Profile,
        expected: Expectation,
        activation: Activation | None,
        shipped: int,
    ) -> int:
        """Store a version of an agent that there is, and return its number, which takes the place of the profile's.

        `shipped` is the number of the shipped version, 0 if there is none. Raises VersionConflict, ProfileLimit.
        """

        def work(connection: Connection) -> int | GatewayError:
            agent = rows.find_agent(connection, organization, profile.agent, lock=True)
            newest = max(agent.newest_version if agent else 0, shipped)
            if not expected.fits(newest, (agent.active_version if agent else None) or shipped):
                return VersionConflict(f"the newest version is {newest}", newest_version=newest)
            if agent is None:
                if full := _full(connection, organization):
                    return full
                if not rows.insert_agent(connection, organization, profile.agent):
                    return work(connection)
            elif agent.version_count >= MAX_VERSIONS:
                return ProfileLimit(f"an agent may have {MAX_VERSIONS} versions", limit=MAX_VERSIONS)
            numbered = profile.model_copy(update={"version": newest + 1})
            self._append(connection, organization, by, numbered, activation)
            return numbered.version

        outcome = self._database.write(work)
        if isinstance(outcome, GatewayError):
            raise outcome
        return outcome

    def activate(self, organization: str, by: str, agent: str, version: int | None) -> int | None:
        """Make a version active from the commit on; return the number that was active before, if one was.

        None is the shipped version, of whichever release.
        """

        def work(connection: Connection) -> int | None:
            before = rows.find_agent(connection, organization, agent, lock=True)
            rows.set_active(connection, organization, agent, version, by)
            return before.active_version if before else None

        return self._database.write(work)

    def _append(
        self, connection: Connection, organization: str, by: str, profile: Profile, activation: Activation | None
    ) -> None:
        rows.insert_version(connection, self._sealer.seal(organization, by, profile))
        if activation is not None:
            rows.set_tokenised(connection, organization, profile.agent, profile.version, activation.tokenised)
            rows.insert_once(connection, profiles, {**activation.worker_row, "version": profile.version})
            rows.set_active(connection, organization, profile.agent, profile.version, by)


def _full(connection: Connection, organization: str) -> ProfileLimit | None:
    if rows.count_agents(connection, organization) < MAX_AGENTS:
        return None
    return ProfileLimit(f"an organization may have {MAX_AGENTS} agents", limit=MAX_AGENTS)
