"""What an organization writes: an agent, or another version of one. A draft is tried if it is to be active at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gateway_app.governance.api_keys import Caller
from gateway_app.profiles.active import ActiveProfile
from gateway_app.profiles.changes import Activation, Expectation, ProfileChanges
from gateway_app.profiles.drafts import Draft, NewAgent, NewVersion
from gateway_app.profiles.finder import Profiles
from gateway_app.profiles.inheritance import Bases
from gateway_app.profiles.pinned import copies
from gateway_app.profiles.pins import Pins
from gateway_app.profiles.sealing import Inherited, Why
from gateway_app.profiles.trial import Trial
from gateway_app.profiles.warming import Warming, Warmth
from tasks.errors import ProfileExists
from tasks.prompts.profile import Profile
from tasks.settings import ProfilesGroup


@dataclass(frozen=True, slots=True)
class Added:
    """The version that was made; `warmth` says how warm it was when it became active, if it was to."""

    version: int
    warmth: Warmth | None = None


class ProfileEditor:
    """Takes drafts, within `limits`."""

    def __init__(
        self,
        profiles: Profiles,
        changes: ProfileChanges,
        bases: Bases,
        trial: Trial,
        warming: Warming,
        pins: Pins,
        limits: ProfilesGroup,
    ) -> None:
        self._profiles = profiles
        self._changes = changes
        self._bases = bases
        self._trial = trial
        self._warming = warming
        self._pins = pins
        self._limits = limits

    def create(self, caller: Caller, draft: NewAgent) -> Added:
        """Make an agent; return its version.

        Raises AdminRequired, InvalidRequest, ProfileExists, ProfileLimit, BaseUnusable, ProfileUnusable.
        """
        organization, profile = caller.organization, draft.profile(draft.agent, 1)
        self._check(caller, draft)
        if draft.agent in self._profiles.shipped or self._profiles.store.agent(organization, draft.agent):
            raise ProfileExists(f"there is already an agent named {draft.agent!r}")
        made = self._tried(organization, draft, profile)
        warmth = self._warmed(organization, made, draft, profile.version)
        self._changes.create(organization, because(caller, draft), profile, made and made[1])
        self._keep(organization, made, profile)
        return Added(profile.version, warmth)

    def add(
        self,
        caller: Caller,
        agent: str,
        draft: NewVersion,
        states: frozenset[str] | None = None,
        **details: Any,
    ) -> Added:
        """Add a version; return it. `states` are those that the agent may be in, if the caller named any.

        Raises AdminRequired, InvalidRequest, UnknownAgent, VersionConflict, ProfileLimit, BaseUnusable,
        ProfileUnusable.
        """
        organization, profile = caller.organization, draft.profile(agent, 1)
        self._profiles.known(organization, agent)
        self._check(caller, draft)
        made = self._tried(organization, draft, profile)
        expected, shipped = Expectation(draft.base_version, states), self._profiles.shipped_number(agent)
        found = self._profiles.store.agent(organization, agent)
        if (refusal := expected.refusal(found, shipped)) is not None:
            # Seen again with the agent locked; but whoever is refused then has waited until the version was warm.
            raise refusal
        likely = max(found.newest_version if found else 0, shipped) + 1
        warmth = self._warmed(organization, made, draft, likely, copies(found))
        version = self._changes.add(
            organization, because(caller, draft), profile, expected, made and made[1], shipped, **details
        )
        self._keep(organization, made, profile.model_copy(update={"version": version}))
        if made is not None:
            self._pins.moved(organization, found, made[0].static_profile_hash)
        return Added(version, warmth)

    def _check(self, caller: Caller, draft: Draft) -> None:
        draft.check(self._limits)
        if draft.activate and self._limits.admins_only:
            caller.require_admin()

    def _tried(self, organization: str, draft: Draft, profile: Profile) -> tuple[ActiveProfile, Activation] | None:
        """Return the draft as it would be used, and what is stored of that, if it is to be active at once."""
        if not draft.activate:
            self._bases.check(organization, profile)
            return None
        inherited = self._bases.resolve(organization, profile)
        active = self._trial.new(organization, inherited.before(profile))
        return active, activation(self._profiles, organization, active, inherited)

    def _warmed(
        self,
        organization: str,
        made: tuple[ActiveProfile, Activation] | None,
        draft: Draft,
        version: int,
        pinned: int = 0,
    ) -> Warmth | None:
        """Have a version computed before it becomes active, as that of its agent's number `version`."""
        if made is None:
            return None
        active = made[0]
        named = replace(active, profile=active.profile.model_copy(update={"version": version}))
        return self._warming.warm(organization, named, pinned, draft.warm_s)

    def _keep(self, organization: str, made: tuple[ActiveProfile, Activation] | None, profile: Profile) -> None:
        if made is not None:
            active, settled = made
            self._profiles.keep(organization, replace(active, profile=settled.inherited.before(profile)))


def because(caller: Caller, said: Any) -> Why:
    """Return who asks for a change and why; `said` has the body's `author` and `reason`."""
    return Why(caller.key_id, said.author, said.reason)


def activation(profiles: Profiles, organization: str, active: ActiveProfile, inherited: Inherited) -> Activation:
    """Return what is stored of a version that is used for the first time."""
    prefixes = profiles.prefixes
    return Activation(inherited, prefixes.tokenised(organization, active), prefixes.row(organization, active))
