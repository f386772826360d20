"""What adds to an organization's agents: each addition is one transaction.

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
from gateway_app.profiles.history import record_change
from gateway_app.profiles.rows import Agent, Tokenised
from gateway_app.profiles.sealing import Inherited, VersionSealer, Why
from tasks.crypto import KeyWrapper
from tasks.db import Database
from tasks.errors import GatewayError, ProfileExists, ProfileLimit, VersionConflict
from tasks.prompts.profile import Profile
from tasks.settings import ProfilesGroup


@dataclass(frozen=True, slots=True)
class Activation:
    """What is settled of a version with its first use: what it inherits, what tokenising gave, the workers' row."""

    inherited: Inherited
    tokenised: Tokenised
    worker_row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the caller of a change believes the agent to be like; None where it does not say."""

    newest_version: int | None = None
    states: frozenset[str] | None = None

    def refusal(self, agent: Agent | None, shipped: int) -> VersionConflict | None:
        """Return the error if the agent is not as expected; `shipped` is the file's number, 0 if there is none."""
        newest = max(agent.newest_version if agent else 0, shipped)
        if self.newest_version in (None, newest) and (self.states is None or state(agent, shipped) in self.states):
            return None
        return VersionConflict(f"the newest version is {newest}", newest_version=newest)


def state(agent: Agent | None, shipped: int) -> str:
    """Return what names an agent's state, as an entity tag: whatever is done to it changes it."""
    if agent is None:
        return f"{shipped}.{shipped}.0"
    return f"{max(agent.newest_version, shipped)}.{agent.current(shipped) or 0}.{agent.revision}"


class ProfileChanges:
    """Adds agents and versions, within `limits`."""

    def __init__(self, database: Database, keys: KeyWrapper, limits: ProfilesGroup) -> None:
        self._database = database
        self._sealer = VersionSealer(keys)
        self._limits = limits

    def create(self, organization: str, why: Why, profile: Profile, activation: Activation | None) -> None:
        """Store an agent that there is none of yet, with its first version. Raises ProfileExists, ProfileLimit."""

        def work(connection: Connection) -> GatewayError | None:
            if full := room_for_agent(connection, organization, self._limits):
                return full
            if not rows.insert_agent(connection, organization, profile.agent):
                return ProfileExists(f"there is already an agent named {profile.agent!r}")
            self._append(connection, organization, why, profile, activation, 0)
            return None

        if (refusal := self._database.write(work)) is not None:
            raise refusal

    def add(
        self,
        organization: str,
        why: Why,
        profile: Profile,
        expected: Expectation,
        activation: Activation | None,
        shipped: int,
        **details: Any,
    ) -> int:
        """Store a version of an agent that there is, and return its number, which takes the place of the profile's.

        `shipped` is the number of the shipped version, 0 if there is none; `details` go into the event if the version
        is active at once. Raises VersionConflict, ProfileLimit.
        """

        def work(connection: Connection) -> int | GatewayError:
            agent = rows.find_agent(connection, organization, profile.agent, lock=True)
            if (refusal := expected.refusal(agent, shipped)) is not None:
                return refusal
            if agent is None:
                if full := room_for_agent(connection, organization, self._limits):
                    return full
                if not rows.insert_agent(connection, organization, profile.agent):
                    return work(connection)
            elif agent.version_count >= self._limits.max_versions:
                limit = self._limits.max_versions
                return ProfileLimit(f"an agent may have {limit} versions", limit=limit)
            newest = max(agent.newest_version if agent else 0, shipped)
            numbered = profile.model_copy(update={"version": newest + 1})
            self._append(connection, organization, why, numbered, activation, shipped, **details)
            return numbered.version

        outcome = self._database.write(work)
        if isinstance(outcome, GatewayError):
            raise outcome
        return outcome

    def _append(
        self,
        connection: Connection,
        organization: str,
        why: Why,
        profile: Profile,
        activation: Activation | None,
        shipped: int,
        **details: Any,
    ) -> None:
        before = rows.find_agent(connection, organization, profile.agent)
        # Its row was found or inserted in this transaction.
        assert before is not None  # noqa: S101
        inherited = activation.inherited if activation else None
        rows.insert_version(connection, self._sealer.seal(organization, why, profile, inherited))
        if activation is None:
            return
        outcome, version = activation.tokenised, profile.version
        rows.set_usable(connection, organization, profile.agent, version, outcome, activation.worker_row)
        rows.set_active(connection, organization, before, version, why.key_id, shipped, outcome.static_profile_hash)
        record_change(
            connection,
            organization,
            profile.agent,
            why,
            "activated",
            before=before.current(shipped),
            after=version,
            static_profile_hash=outcome.static_profile_hash,
            pins=[list(pin) for pin in activation.inherited.pins] or None,
            canary_ended=before.canary(shipped),
            **details,
        )


def room_for_agent(connection: Connection, organization: str, limits: ProfilesGroup) -> ProfileLimit | None:
    """Return the error if the organization has as many agents as it may."""
    if rows.count_agents(connection, organization) < limits.max_agents:
        return None
    return ProfileLimit(f"an organization may have {limits.max_agents} agents", limit=limits.max_agents)
