"""What changes which version of an agent requests get: each change and its event are one transaction.

The agent's row is locked first, so that changes come one after the other and each knows what it replaced. As in
`changes`, what refuses a change is returned by the transaction and raised outside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import Connection

from gateway_app.profiles import rows
from gateway_app.profiles.changes import Activation, Expectation, room_for_agent
from gateway_app.profiles.history import Action, record_change
from gateway_app.profiles.rows import Agent
from gateway_app.profiles.sealing import VersionSealer, Why
from tasks.crypto import KeyWrapper
from tasks.db import Database, now
from tasks.errors import GatewayError, NotFound, VersionConflict
from tasks.prompts.profile import Profile
from tasks.settings import ProfilesGroup

NO_CANARY = {"canary_version": None, "canary_share": None, "canary_since": None}


@dataclass(frozen=True, slots=True)
class Settled:
    """A stored version, by its own text and wrapped data key, and what is settled of it now that it is first used."""

    profile: Profile
    data_key: bytes
    activation: Activation


@dataclass(frozen=True, slots=True)
class Target:
    """A version that requests are to get: `own` tells it from the file. `settled` is None if all was settled before."""

    number: int
    own: bool
    static_profile_hash: str
    settled: Settled | None = None

    @property
    def stored_as(self) -> int:
        """Return its number as an agent's row names it: 0 is the file."""
        return self.number if self.own else 0


@dataclass(frozen=True, slots=True)
class Place:
    """The agent that is changed, and what its caller expects; `shipped` is the file's number, 0 if there is none."""

    organization: str
    agent: str
    shipped: int
    expected: Expectation


class Transitions:
    """Makes these changes. Each raises VersionConflict if the agent is not as expected, or ProfileLimit."""

    def __init__(self, database: Database, keys: KeyWrapper, limits: ProfilesGroup) -> None:
        self._database = database
        self._sealer = VersionSealer(keys)
        self._limits = limits

    def activate(
        self,
        place: Place,
        why: Why,
        target: Target,
        action: Action = "activated",
        still: Callable[[Agent], bool] = lambda _: True,
    ) -> int | None:
        """Make a version active and end a trial; return the number that was active before, if one was.

        Refused if `still` is not true of the agent: what made the caller choose this version has changed.
        """

        def work(connection: Connection, agent: Agent) -> GatewayError | int | None:
            if not still(agent):
                return _changed(agent, place)
            if (refusal := self._settle(connection, place, target)) is not None:
                return refusal
            number = target.number if target.own else None
            hashed = target.static_profile_hash
            rows.set_active(connection, place.organization, agent, number, why.key_id, place.shipped, hashed)
            before = agent.current(place.shipped)
            ended = None if action == "canary_promoted" else agent.canary(place.shipped)
            self._record(connection, place, why, action, before, target, canary_ended=ended)
            return before

        return self.change(place, work)

    def set_canary(self, place: Place, why: Why, target: Target, share: float) -> None:
        """Have a version run beside the active one. Raises NotFound if none is active or it is this one."""

        def work(connection: Connection, agent: Agent) -> GatewayError | None:
            current = agent.current(place.shipped)
            if current is None or (agent.active_version or 0) == target.stored_as:
                return NotFound("a canary runs beside the active version, which there must be, and be another one")
            if (refusal := self._settle(connection, place, target)) is not None:
                return refusal
            at = now()
            # A canary that gets another share goes on: its figures count from its beginning.
            since = agent.canary_since if agent.canary_version == target.stored_as else at
            values = {"canary_version": target.stored_as, "canary_share": share, "canary_since": since}
            rows.change_agent(connection, place.organization, place.agent, values)
            rows.set_used(connection, place.organization, place.agent, target.stored_as or None, at)
            self._record(connection, place, why, "canary_set", agent.canary(place.shipped), target, share=share)
            return None

        self.change(place, work)

    def stop_canary(self, place: Place, why: Why) -> None:
        """End a trial: all requests get the active version. Raises NotFound if there is none."""

        def work(connection: Connection, agent: Agent) -> GatewayError | None:
            if agent.canary_version is None:
                return NotFound(f"{place.agent!r} has no canary")
            rows.change_agent(connection, place.organization, place.agent, NO_CANARY)
            self._record(connection, place, why, "canary_stopped", agent.canary(place.shipped), None)
            return None

        self.change(place, work)

    def retire(self, place: Place, why: Why) -> int | None:
        """Take the agent out of use; return the number that was active. Its versions stay, and can be active again."""

        def work(connection: Connection, agent: Agent) -> GatewayError | int | None:
            before = agent.current(place.shipped)
            if agent.retired_at is None:
                previous = agent.previous_version if before is None else agent.active_version or 0
                values = {"active_version": None, "previous_version": previous, "retired_at": now(), **NO_CANARY}
                rows.change_agent(connection, place.organization, place.agent, values)
                ended = agent.canary(place.shipped)
                self._record(connection, place, why, "retired", before, None, canary_ended=ended)
            return before

        return self.change(place, work)

    def change(self, place: Place, work: Callable[[Connection, Agent], GatewayError | int | None]) -> int | None:
        """Do `work` on the agent, whose row is locked, and made first if there is none; raise what it returns if that is an error."""

        def locked(connection: Connection) -> GatewayError | int | None:
            agent = rows.find_agent(connection, place.organization, place.agent, lock=True)
            if (refusal := place.expected.refusal(agent, place.shipped)) is not None:
                return refusal
            if agent is None:
                if full := room_for_agent(connection, place.organization, self._limits):
                    return full
                if not rows.insert_agent(connection, place.organization, place.agent):
                    # Somebody else made the row in this moment, and may have changed it.
                    return locked(connection)
                agent = rows.find_agent(connection, place.organization, place.agent)
            # A row that was just inserted is there.
            assert agent is not None  # noqa: S101
            return work(connection, agent)

        outcome = self._database.write(locked)
        if isinstance(outcome, GatewayError):
            raise outcome
        return outcome

    def _settle(self, connection: Connection, place: Place, target: Target) -> VersionConflict | None:
        """Store what is settled with the first use, unless somebody else did so in the meantime."""
        if target.settled is None:
            return None
        profile, made = target.settled.profile, target.settled.activation
        organization = place.organization
        sealed = self._sealer.seal_inherited(organization, profile, target.settled.data_key, made.inherited)
        if not rows.pin(connection, organization, place.agent, target.number, made.inherited.pins, sealed):
            return VersionConflict("the version was made active by somebody else in this moment")
        rows.set_usable(connection, organization, place.agent, target.number, made.tokenised, made.worker_row)
        return None

    def _record(
        self,
        connection: Connection,
        place: Place,
        why: Why,
        action: Action,
        before: int | None,
        target: Target | None,
        **details: Any,
    ) -> None:
        pins = target.settled.activation.inherited.pins if target and target.settled else ()
        record_change(
            connection,
            place.organization,
            place.agent,
            why,
            action,
            before=before,
            after=target.number if target else None,
            static_profile_hash=target.static_profile_hash if target else None,
            pins=[list(pin) for pin in pins] or None,
            **details,
        )


def _changed(agent: Agent, place: Place) -> VersionConflict:
    newest = max(agent.newest_version, place.shipped)
    return VersionConflict("the agent was changed in the meantime", newest_version=newest)
