"""An agent's version as a row: its text sealed.

A version has a data key of its own, wrapped for this organization, agent and number alone, so that no row can be
passed off as another's. Description, segments and what is inherited are sealed apart, so that a list need not open
whole profiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy.engine import Row

from gateway_app.profiles.rows import Pin, Tokenised
from tasks.crypto import DecryptionFailed, KeyWrapper, seal, unseal
from tasks.db import now
from tasks.errors import GatewayError
from tasks.prompts.profile import AnySegment, Profile

Segments = tuple[AnySegment, ...]
_SEGMENTS: TypeAdapter[Segments] = TypeAdapter(Segments)


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a profile has from its bases: their segments, and which versions those are of, the nearest first."""

    segments: Segments = ()
    pins: tuple[Pin, ...] = ()

    def before(self, own: Profile) -> Profile:
        """Return the whole profile, whose segments begin with these."""
        return own.model_copy(update={"segments": (*self.segments, *own.segments)}) if self.segments else own


@dataclass(frozen=True, slots=True)
class Why:
    """Who asks for a change, by the id of the API key and a name if one was given, and for what reason."""

    key_id: str
    author: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Version:
    """A stored version, without its text. `pins` is None until it is known what it inherits."""

    number: int
    description: str
    created_at: datetime
    created_by: str
    tokenised: Tokenised | None
    extends: str | None
    abstract: bool
    author: str | None
    reason: str | None
    activated_at: datetime | None
    pins: tuple[Pin, ...] | None


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored version with its own text, and its data key, wrapped.

    `inherited` is None until it is known, or if it extends nothing.
    """

    profile: Profile
    version: Version
    inherited: Inherited | None
    data_key: bytes

    @property
    def whole(self) -> Profile | None:
        """Return the profile with what it inherits; None if that is not known yet."""
        if self.inherited is not None:
            return self.inherited.before(self.profile)
        return self.profile if self.profile.extends is None else None


class VersionSealer:
    """Turns versions into rows of `profile_versions` and back."""

    def __init__(self, keys: KeyWrapper) -> None:
        self._keys = keys

    def seal(self, organization: str, why: Why, profile: Profile, inherited: Inherited | None) -> dict[str, Any]:
        """Return the row of a new version; with `inherited`, pinned from its start."""
        owner = _owner(organization, profile.agent, profile.version)
        data_key, wrapped = self._keys.new_key(owner)
        row = {
            "organization": organization,
            "agent_name": profile.agent,
            "version": profile.version,
            "data_key": wrapped,
            "description": seal(data_key, profile.description.encode(), f"{owner}\ndescription"),
            "segments": seal(data_key, _SEGMENTS.dump_json(profile.segments), f"{owner}\nsegments"),
            "created_at": now(),
            "created_by": why.key_id,
            "extends": profile.extends,
            "abstract": profile.abstract,
            "author": why.author,
            "reason": why.reason,
        }
        if inherited is not None and profile.extends is not None:
            row["pins"] = [list(pin) for pin in inherited.pins]
            row["inherited"] = self.seal_inherited(organization, profile, wrapped, inherited)
        return row

    def seal_inherited(self, organization: str, profile: Profile, wrapped: bytes, inherited: Inherited) -> bytes:
        """Return the column of what a version inherits; `wrapped` is the version's data key."""
        owner = _owner(organization, profile.agent, profile.version)
        data_key = self._keys.unwrap(wrapped, owner)
        return seal(data_key, _SEGMENTS.dump_json(inherited.segments), f"{owner}\ninherited")

    def version(self, row: Row[Any]) -> Version:
        """Return the version in a row that may lack `segments` and `inherited`.

        Raises GatewayError if it cannot be opened.
        """
        tokenised = None
        if row.prefix_base is not None:
            tokenised = Tokenised(row.prefix_base, row.static_profile_hash, row.static_token_count, row.joinable)
        return Version(
            number=row.version,
            description=self._open(row, "description"),
            created_at=row.created_at,
            created_by=row.created_by,
            tokenised=tokenised,
            extends=row.extends,
            abstract=row.abstract,
            author=row.author,
            reason=row.reason,
            activated_at=row.activated_at,
            pins=None if row.pins is None else tuple(Pin(*pin) for pin in row.pins),
        )

    def stored(self, row: Row[Any]) -> Stored:
        """Return the version with its text. Raises GatewayError if it cannot be opened."""
        version = self.version(row)
        profile = Profile(
            agent=row.agent_name,
            version=row.version,
            description=version.description,
            extends=row.extends,
            abstract=row.abstract,
            segments=_SEGMENTS.validate_json(self._open(row, "segments")),
        )
        if version.pins is None:
            return Stored(profile, version, None, row.data_key)
        segments = _SEGMENTS.validate_json(self._open(row, "inherited"))
        return Stored(profile, version, Inherited(segments, version.pins), row.data_key)

    def _open(self, row: Row[Any], field: str) -> str:
        owner = _owner(row.organization, row.agent_name, row.version)
        try:
            return unseal(self._keys.unwrap(row.data_key, owner), getattr(row, field), f"{owner}\n{field}").decode()
        except DecryptionFailed:
            raise GatewayError(
                f"version {row.version} of {row.agent_name!r} cannot be decrypted; is its master key still configured?"
            ) from None


def _owner(organization: str, agent: str, version: int) -> str:
    return f"profile-version:{organization}\n{agent}\n{version}"
