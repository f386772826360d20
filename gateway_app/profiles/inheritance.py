"""What a profile inherits: the segments of the profile it extends, which go before its own.

A base is resolved when the version that extends it is first used, and never again: the base's active version is taken
then, with what that inherits in turn, and text and numbers are kept with the version. So nothing that is done to a base
changes what runs. A version whose base has moved on is behind, and stays so until somebody rebases it.

The order of segments holds for the whole, so that text never follows exchanges, nor a base's general words a role.
"""

from __future__ import annotations

from collections.abc import Collection

from gateway_app.profiles.finder import Profiles
from gateway_app.profiles.rows import Pin
from gateway_app.profiles.sealing import Inherited
from gateway_app.profiles.store import ProfileStore
from tasks.errors import BaseUnusable
from tasks.prompts.profile import ORDER, Profile, in_order


class Bases:
    """Resolves what profiles extend. `max_depth` is how many bases may stand above one another."""

    def __init__(self, profiles: Profiles, max_depth: int) -> None:
        self._profiles = profiles
        self._max_depth = max_depth

    def check(self, organization: str, profile: Profile) -> None:
        """Raise BaseUnusable if a draft extends what is not there. Whether it can be used is seen when it is."""
        check_base(organization, profile.agent, profile.extends, self._profiles.shipped, self._profiles.store)

    def resolve(self, organization: str, profile: Profile) -> Inherited:
        """Return what the profile inherits as of now. Raises BaseUnusable."""
        self.check(organization, profile)
        if profile.extends is None:
            return Inherited()
        found = self._profiles.current(organization, profile.extends)
        if found is None:
            raise BaseUnusable(f"no version of {profile.extends!r} is active, so there is nothing to extend yet")
        whole, number, pins = found
        inherited = Inherited(whole.segments, (Pin(profile.extends, number), *pins))
        names = [pin.agent for pin in inherited.pins]
        if profile.agent in names:
            raise BaseUnusable(f"{profile.agent!r} would extend itself: {' extends '.join([profile.agent, *names])}")
        if len(names) > self._max_depth:
            raise BaseUnusable(
                f"at most {self._max_depth} profiles may stand above one another, and here are {len(names)}"
            )
        if not in_order(inherited.before(profile).segments):
            raise BaseUnusable(
                f"with what {profile.extends!r} holds, the segments are not in the order {', '.join(ORDER)}"
            )
        return inherited

    def behind(self, organization: str, pins: tuple[Pin, ...] | None) -> tuple[Pin, int] | None:
        """Return the base and the number that it has now, if a version's base has moved on since it was pinned."""
        if not pins:
            return None
        now = self._profiles.current_number(organization, pins[0].agent)
        return None if now in (None, pins[0].version) else (pins[0], now)

    def children_behind(self, organization: str, base: str) -> list[str]:
        """Return the agents whose active version extends another version of `base` than the active one."""
        now = self._profiles.current_number(organization, base)
        children = self._profiles.store.children(organization, base) if now is not None else []
        return [name for name, version in children if version.pins and version.pins[0].version != now]


def check_base(organization: str, agent: str, base: str | None, shipped: Collection[str], store: ProfileStore) -> None:
    """Raise BaseUnusable if there is no agent named `base`, of the organization or shipped, or it is `agent`."""
    if base == agent:
        raise BaseUnusable(f"{base!r} cannot extend itself")
    if base is not None and base not in shipped and store.agent(organization, base) is None:
        raise BaseUnusable(f"there is no agent named {base!r} to extend")
