"""Pinned agents: copies of their active version are kept warm, so that no request of theirs waits for the static part.

A pin is kept in SQL with its agent, together with the hash of what is to be warm: that of the active version, which every
change of the active version takes along in its own transaction. From there it goes to Redis as a wish that lasts, at once
when something changes, and again from the housekeeper where Redis has lost it (`gateway_app.housekeeping.pins`). A worker
computes what is wished for whenever it is not there: after an eviction, a worker's restart, a new version. What is not wished
for any more is not thrown away; it makes room like anything else.

(These have nothing to do with `pins` of a version, which say what it inherits.)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import redis
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gateway_app.governance.api_keys import Caller
from gateway_app.profiles import rows
from gateway_app.profiles.active import ActiveProfile
from gateway_app.profiles.changes import Expectation
from gateway_app.profiles.drafts import Because, NewPin
from gateway_app.profiles.finder import Profiles
from gateway_app.profiles.history import record_change
from gateway_app.profiles.pinned import copies, count_pinned, hashes_of, pinned_parts
from gateway_app.profiles.rows import Agent
from gateway_app.profiles.sealing import Why
from gateway_app.profiles.transitions import Place, Transitions
from gateway_app.profiles.wishes import Seen, Wanted, Wishes
from tasks.db import Database
from tasks.errors import GatewayError, NotFound, ProfileLimit, ProfileUnusable, VersionConflict
from tasks.logs import get_logger
from tasks.schema_profiles import agents
from tasks.settings import ProfilesGroup

States = frozenset[str] | None
logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pinned:
    """An agent's pin: `copies` of its active version, number `version`, are kept warm, none if it is not pinned.

    The hash is None if that version is not known with the model that is served now. `seen` says where copies are; it is None
    then too, and if Redis does not answer.
    """

    copies: int
    version: int | None
    static_profile_hash: str | None
    seen: Seen | None


class Pins:
    """Pins agents. Every method but `show` raises AdminRequired where the settings ask for an admin key."""

    def __init__(
        self,
        profiles: Profiles,
        transitions: Transitions,
        database: Database,
        wishes: Wishes | None,
        limits: ProfilesGroup,
    ) -> None:
        self._profiles = profiles
        self._transitions = transitions
        self._database = database
        self._wishes = wishes
        self._limits = limits

    def pin(self, caller: Caller, agent: str, wanted: NewPin, states: States = None) -> Pinned:
        """Keep copies of the agent's active version warm.

        Raises UnknownAgent, ProfileUnusable if there is nothing to keep, ProfileLimit, VersionConflict.
        """
        self._allow(caller)
        organization = caller.organization
        found = self._profiles.store.agent(organization, agent)
        active = self._active(organization, agent, found)
        if active is None or active.profile.abstract:
            raise self._profiles.unknown(organization, agent)
        if not active.static_token_count:
            raise ProfileUnusable("the profile is encoded whole with each request, so nothing of it can be kept")
        self._profiles.prefixes.store(organization, active)
        number, hashed = active.profile.version, active.static_profile_hash

        def work(connection: Connection, locked: Agent) -> GatewayError | None:
            if (locked.active_version, locked.retired_at) != ((found.active_version, None) if found else (None, None)):
                return VersionConflict("the agent was changed in the meantime", newest_version=locked.newest_version)
            if locked.pinned_copies is None and count_pinned(connection, organization) >= self._limits.max_pinned:
                limit = self._limits.max_pinned
                return ProfileLimit(f"an organization may have {limit} pinned agents", limit=limit)
            values = {"pinned_copies": wanted.copies, "pinned_hash": hashed}
            rows.change_agent(connection, organization, agent, values)
            facts = {"before": number, "after": number, "copies": wanted.copies}
            why = _because(caller, wanted)
            record_change(connection, organization, agent, why, "pinned", static_profile_hash=hashed, **facts)
            return None

        self._transitions.change(self._place(organization, agent, states), work)
        self.follow(organization, {hashed, *hashes_of(found)})
        return self.show(organization, agent)

    def unpin(self, caller: Caller, agent: str, why: Because, states: States = None) -> Pinned:
        """Keep nothing of the agent warm any more. Raises UnknownAgent, NotFound if it is not pinned."""
        self._allow(caller)
        organization = caller.organization
        self._profiles.known(organization, agent)
        let_go: set[str] = set()

        def work(connection: Connection, locked: Agent) -> GatewayError | None:
            if locked.pinned_copies is None:
                return NotFound(f"{agent!r} is not pinned")
            let_go.update(hashes_of(locked))
            rows.change_agent(connection, organization, agent, {"pinned_copies": None, "pinned_hash": None})
            number = locked.current(self._profiles.shipped_number(agent))
            record_change(
                connection, organization, agent, _because(caller, why), "unpinned", before=number, after=number
            )
            return None

        self._transitions.change(self._place(organization, agent, states), work)
        self.follow(organization, let_go)
        return self.show(organization, agent)

    def show(self, organization: str, agent: str) -> Pinned:
        """Return how the agent is pinned, and where copies are. Raises UnknownAgent."""
        self._profiles.known(organization, agent)
        found, shipped = self._profiles.store.agent(organization, agent), self._profiles.shipped_number(agent)
        version = (found.current(shipped) if found else shipped) or None
        wanted, seen = self._known(organization, agent, found), None
        if self._wishes is not None and wanted is not None and wanted.static_tokens:
            try:
                seen = self._wishes.look(wanted)
            except redis.RedisError as error:
                logger.warning("where copies are is not known", error=type(error).__name__)
        return Pinned(copies(found), version, wanted.static_profile_hash if wanted else None, seen)

    def agents(self, organization: str) -> list[str]:
        """Return the names of the organization's pinned agents, in order."""
        mine = agents.c.organization == organization, agents.c.pinned_copies.is_not(None)
        query = sa.select(agents.c.agent_name).where(*mine).order_by(agents.c.agent_name)
        return self._database.read(lambda connection: list(connection.execute(query).scalars()))

    def moved(self, organization: str, before: Agent | None, static_profile_hash: str | None) -> None:
        """Have Redis wish for what is active now, by its hash, in place of what was, if the agent is pinned."""
        if gone := hashes_of(before):
            self.follow(organization, {*gone, *((static_profile_hash,) if static_profile_hash else ())})

    def follow(self, organization: str, hashes: Collection[str]) -> None:
        """Have Redis wish for these as SQL says by now. What Redis does not hear of, the housekeeper tells it."""
        if self._wishes is None or not hashes:
            return
        pinned = self._database.read(lambda connection: pinned_parts(connection, organization, hashes))
        try:
            for wanted, count in pinned:
                self._wishes.say(wanted, count)
            for gone in set(hashes) - {wanted.static_profile_hash for wanted, _ in pinned}:
                self._wishes.end(gone)
        except redis.RedisError as error:
            logger.warning("redis hears of a pin later", error=type(error).__name__)

    def catch_up(self) -> int:
        """Have pins name what is active where that has another hash, though nobody changed the agent; return how many did not.

        A release may bring another file, or another model be served. To be called when a process starts.
        """
        query = sa.select(agents).where(agents.c.pinned_copies.is_not(None), agents.c.retired_at.is_(None))
        found = self._database.read(lambda connection: list(connection.execute(query)))
        return sum(self._catch_up(row.organization, rows.as_agent(row)) for row in found)

    def _catch_up(self, organization: str, agent: Agent) -> bool:
        name, old = agent.agent_name, agent.pinned_hash
        known = self._known(organization, name, agent)
        if known is not None and known.static_profile_hash == old:
            return False
        try:
            active = self._active(organization, name, agent)
        except GatewayError as error:
            logger.warning("a pinned version is of no use with the model that is served", code=error.code)
            return False
        if active is None or active.static_profile_hash == old:
            return False
        as_seen = agents.c.revision == agent.revision, agents.c.pinned_hash == old
        this = agents.c.organization == organization, agents.c.agent_name == name
        change = sa.update(agents).where(*this, *as_seen).values(pinned_hash=active.static_profile_hash)
        self._database.write(lambda connection: connection.execute(change) and None)
        self.follow(organization, {active.static_profile_hash, *hashes_of(agent)})
        return True

    def _allow(self, caller: Caller) -> None:
        if self._limits.admins_only:
            caller.require_admin()

    def _known(self, organization: str, agent: str, found: Agent | None) -> Wanted | None:
        """Return the static part of the version that is active, without its chain, if it need not be tokenised for that."""
        if found is not None and found.active_version is not None:
            stored = self._profiles.store.find(organization, agent, found.active_version)
            known = stored.version.tokenised if stored is not None else None
            if known is None or known.prefix_base != self._profiles.prefixes.base(organization):
                return None
            return Wanted(organization, known.static_profile_hash, known.static_token_count)
        if agent in self._profiles.shipped and (found is None or found.retired_at is None):
            return Wanted.of(organization, self._profiles.name_shipped(organization, agent))
        return None

    def _active(self, organization: str, agent: str, found: Agent | None) -> ActiveProfile | None:
        """Return the version that is active, tokenised."""
        if found is not None and found.active_version is not None:
            return self._profiles.version(organization, agent, found.active_version)
        if agent in self._profiles.shipped and (found is None or found.retired_at is None):
            return self._profiles.shipped_version(organization, agent)
        return None

    def _place(self, organization: str, agent: str, states: States) -> Place:
        return Place(organization, agent, self._profiles.shipped_number(agent), Expectation(states=states))


def _because(caller: Caller, said: Because) -> Why:
    return Why(caller.key_id, said.author, said.reason)
