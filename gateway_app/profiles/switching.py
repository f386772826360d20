"""What an organization does with its versions: activate one, go back, run two side by side, retire the agent.

A version is tried before requests get it. With its first use it is settled what it inherits; from then on its text, and
so its hash, is the same for good, whether it is active, on trial, or active again.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway_app.governance.api_keys import Caller
from gateway_app.profiles.active import ActiveProfile
from gateway_app.profiles.changes import Expectation
from gateway_app.profiles.drafts import ActivateVersion, Because, NewCanary, NewVersion, Promotion, RollBack
from gateway_app.profiles.editor import ProfileEditor, activation, because
from gateway_app.profiles.finder import Profiles
from gateway_app.profiles.inheritance import Bases
from gateway_app.profiles.pinned import copies
from gateway_app.profiles.pins import Pins
from gateway_app.profiles.rows import Agent
from gateway_app.profiles.sealing import Stored
from gateway_app.profiles.transitions import Place, Settled, Target, Transitions
from gateway_app.profiles.trial import Trial
from gateway_app.profiles.warming import Warming, Warmth
from tasks.errors import NotFound
from tasks.settings import ProfilesGroup

States = frozenset[str] | None


@dataclass(frozen=True, slots=True)
class Activated:
    """A version that is active now, and how warm it was when it became so.

    `least_prompt_tokens` is the length of a prompt whose task is one letter.
    """

    active: ActiveProfile
    least_prompt_tokens: int
    context_window: int
    previous_version: int | None
    warmth: Warmth | None


class ProfileSwitch:
    """Decides which versions requests get. Every method raises AdminRequired where the settings ask for an admin key.

    `states` are those that the agent may be in, if the caller named any: else VersionConflict is raised.
    """

    def __init__(
        self,
        profiles: Profiles,
        transitions: Transitions,
        editor: ProfileEditor,
        bases: Bases,
        trial: Trial,
        warming: Warming,
        pins: Pins,
        limits: ProfilesGroup,
    ) -> None:
        self._profiles = profiles
        self._transitions = transitions
        self._editor = editor
        self._bases = bases
        self._trial = trial
        self._warming = warming
        self._pins = pins
        self._limits = limits

    def activate(self, caller: Caller, agent: str, wanted: ActivateVersion, states: States = None) -> Activated:
        """Make a version active. Raises UnknownAgent, NotFound, BaseUnusable, ProfileUnusable, ServiceUnavailable."""
        self._allow(caller)
        stored = self._profiles.store.find(caller.organization, agent, wanted.version)
        if wanted.rebase and stored is not None and self._has_moved(caller.organization, stored):
            return self._rebase(caller, agent, stored, wanted, states)
        target, active = self._target(caller, agent, wanted.version, stored)
        place = self._place(caller, agent, states)
        warmth, found = self._warm(place, active, wanted.warm_s)
        before = self._transitions.activate(place, because(caller, wanted), target)
        return self._activated(place, active, target, before, warmth, found)

    def roll_back(self, caller: Caller, agent: str, wanted: RollBack, states: States = None) -> Activated:
        """Make the version active again that was so before, or a given one. Raises NotFound if there was none."""
        self._allow(caller)
        organization = caller.organization
        self._profiles.known(organization, agent)
        found = self._profiles.store.agent(organization, agent)
        previous = found.previous_version if found else None
        # The file may have a number by now that is an own version's, too.
        file = wanted.version is None and previous == 0
        number = wanted.version or (self._profiles.shipped_number(agent) if file else previous)
        stored = self._profiles.store.find(organization, agent, number) if number and not file else None
        if not number or (stored is not None and stored.version.activated_at is None):
            raise NotFound(f"no such version of {agent!r} was active before; `activate` takes any")
        chosen = wanted.version is not None

        def still(locked: Agent) -> bool:
            return chosen or locked.previous_version == previous

        target, active = self._target(caller, agent, number, stored)
        place = self._place(caller, agent, states)
        warmth, found = self._warm(place, active, wanted.warm_s)
        before = self._transitions.activate(place, because(caller, wanted), target, "rolled_back", still)
        return self._activated(place, active, target, before, warmth, found)

    def retire(self, caller: Caller, agent: str, why: Because, states: States = None) -> int | None:
        """Take an agent out of use; return the number of the version that was active. Raises UnknownAgent."""
        self._allow(caller)
        self._profiles.known(caller.organization, agent)
        found = self._profiles.store.agent(caller.organization, agent)
        before = self._transitions.retire(self._place(caller, agent, states), because(caller, why))
        self._pins.moved(caller.organization, found, None)
        return before

    def set_canary(self, caller: Caller, agent: str, wanted: NewCanary, states: States = None) -> Warmth:
        """Have a version run beside the active one; return how warm it is. Raises as `activate` does."""
        self._allow(caller)
        stored = self._profiles.store.find(caller.organization, agent, wanted.version)
        target, active = self._target(caller, agent, wanted.version, stored)
        place = self._place(caller, agent, states)
        warmth, _ = self._warm(place, active, wanted.warm_s)
        self._transitions.set_canary(place, because(caller, wanted), target, wanted.share)
        self._keep(caller.organization, target, active)
        return warmth

    def stop_canary(self, caller: Caller, agent: str, why: Because, states: States = None) -> None:
        """End a trial. Raises UnknownAgent, NotFound."""
        self._allow(caller)
        self._profiles.known(caller.organization, agent)
        self._transitions.stop_canary(self._place(caller, agent, states), because(caller, why))

    def promote_canary(self, caller: Caller, agent: str, why: Promotion, states: States = None) -> Activated:
        """Make the canary the active version. Raises UnknownAgent, NotFound."""
        self._allow(caller)
        organization = caller.organization
        self._profiles.known(organization, agent)
        found = self._profiles.store.agent(organization, agent)
        number = found.canary(self._profiles.shipped_number(agent)) if found else None
        if found is None or number is None:
            raise NotFound(f"{agent!r} has no canary")
        stored = self._profiles.store.find(organization, agent, number) if found.canary_version else None
        target, active = self._target(caller, agent, number, stored)
        place = self._place(caller, agent, states)
        warmth, seen = self._warm(place, active, why.warm_s)
        before = self._transitions.activate(
            place,
            because(caller, why),
            target,
            "canary_promoted",
            lambda locked: locked.canary_version == target.stored_as,
        )
        return self._activated(place, active, target, before, warmth, seen)

    def _allow(self, caller: Caller) -> None:
        if self._limits.admins_only:
            caller.require_admin()

    def _place(self, caller: Caller, agent: str, states: States) -> Place:
        return Place(caller.organization, agent, self._profiles.shipped_number(agent), Expectation(states=states))

    def _target(self, caller: Caller, agent: str, number: int, stored: Stored | None) -> tuple[Target, ActiveProfile]:
        """Try a version; `stored` is it if it is the organization's own."""
        organization, profiles = caller.organization, self._profiles
        if stored is None:
            if profiles.shipped_number(agent) != number:
                profiles.known(organization, agent)
                raise NotFound(f"there is no version {number} of {agent!r}")
            active = self._trial.shipped(organization, agent)
            return Target(number, own=False, static_profile_hash=active.static_profile_hash), active
        if stored.whole is not None:
            active = self._trial.stored(organization, agent, number, stored.whole)
            return Target(number, own=True, static_profile_hash=active.static_profile_hash), active
        inherited = self._bases.resolve(organization, stored.profile)
        active = self._trial.new(organization, inherited.before(stored.profile))
        made = activation(profiles, organization, active, inherited)
        settled = Settled(stored.profile, stored.data_key, made)
        return Target(number, own=True, static_profile_hash=active.static_profile_hash, settled=settled), active

    def _warm(self, place: Place, active: ActiveProfile, longest_s: float | None) -> tuple[Warmth, Agent | None]:
        """Have a version computed before requests get it. Returns how warm it is, and the agent as it was before that.

        Raises VersionConflict at once if the agent is not as expected.
        """
        found = self._profiles.store.agent(place.organization, place.agent)
        if (refusal := place.expected.refusal(found, place.shipped)) is not None:
            raise refusal
        return self._warming.warm(place.organization, active, copies(found), longest_s), found

    def _activated(
        self,
        place: Place,
        active: ActiveProfile,
        target: Target,
        before: int | None,
        warmth: Warmth | None,
        found: Agent | None,
    ) -> Activated:
        self._keep(place.organization, target, active)
        self._pins.moved(place.organization, found, active.static_profile_hash)
        least = self._trial.least_prompt(active.layout)
        return Activated(active, least, self._trial.context_window, before, warmth)

    def _keep(self, organization: str, target: Target, active: ActiveProfile) -> None:
        if target.settled is not None:
            self._profiles.keep(organization, active)

    def _has_moved(self, organization: str, stored: Stored) -> bool:
        return self._bases.behind(organization, stored.version.pins) is not None

    def _rebase(self, caller: Caller, agent: str, stored: Stored, wanted: ActivateVersion, states: States) -> Activated:
        """Add the version again, on its base as it is now, and make that active."""
        found = self._profiles.current_number(caller.organization, agent)
        text = {name: getattr(stored.profile, name) for name in ("description", "extends", "abstract", "segments")}
        said = {name: getattr(wanted, name) for name in ("author", "reason", "warm_s")}
        added = self._editor.add(
            caller, agent, NewVersion(**text, **said, activate=True), states, rebased_from=stored.version.number
        )
        active = self._profiles.version(caller.organization, agent, added.version)
        least = self._trial.least_prompt(active.layout)
        return Activated(active, least, self._trial.context_window, found, added.warmth)
