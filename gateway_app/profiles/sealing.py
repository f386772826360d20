"""An agent's version as a row: its text sealed.

A version has a data key of its own, wrapped for this organization, agent and number alone, so that no row can be
passed off as another's. Description and segments are sealed apart, so that a list need not open whole profiles.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Row

from gateway_app.profiles.rows import Tokenised
from tasks.crypto import DecryptionFailed, KeyWrapper, seal, unseal
from tasks.db import now
from tasks.errors import GatewayError
from tasks.prompts.profile import Profile, Segment


@dataclass(frozen=True, slots=True)
class Version:
    """A stored version, without its text."""

    number: int
    description: str
    created_at: datetime
    created_by: str
    tokenised: Tokenised | None


class VersionSealer:
    """Turns versions into rows of `profile_versions` and back."""

    def __init__(self, keys: KeyWrapper) -> None:
        self._keys = keys

    def seal(self, organization: str, by: str, profile: Profile) -> dict[str, Any]:
        """Return the row of a new version, made by the API key with the id `by`."""
        owner = _owner(organization, profile.agent, profile.version)
        data_key, wrapped = self._keys.new_key(owner)
        segments = json.dumps([segment.model_dump() for segment in profile.segments], ensure_ascii=False)
        return {
            "organization": organization,
            "agent_name": profile.agent,
            "version": profile.version,
            "data_key": wrapped,
            "description": seal(data_key, profile.description.encode(), f"{owner}\ndescription"),
            "segments": seal(data_key, segments.encode(), f"{owner}\nsegments"),
            "created_at": now(),
            "created_by": by,
        }

    def version(self, row: Row[Any]) -> Version:
        """Return the version in a row that may lack `segments`. Raises GatewayError if it cannot be opened."""
        tokenised = None
        if row.prefix_base is not None:
            tokenised = Tokenised(row.prefix_base, row.static_profile_hash, row.static_token_count, row.joinable)
        return Version(row.version, self._open(row, "description"), row.created_at, row.created_by, tokenised)

    def profile(self, row: Row[Any]) -> Profile:
        """Return the version's text. Raises GatewayError if it cannot be opened."""
        return Profile(
            agent=row.agent_name,
            version=row.version,
            description=self._open(row, "description"),
            segments=tuple(Segment.model_validate(item) for item in json.loads(self._open(row, "segments"))),
        )

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
