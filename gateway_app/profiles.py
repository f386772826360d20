"""The agent profiles this gateway serves, tokenised once and named by their hash.

Profiles are read and tokenised at the start, so that a bad one stops it. A profile's hash starts from the
organization's salt; it is worked out, and its ids stored for the workers, when an organization first uses the agent.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from sqlalchemy.engine import Connection

from tasks.crypto import KeyWrapper, derive, seal
from tasks.db import Database, now
from tasks.errors import UnknownAgent
from tasks.prompts.chain import hash_chain
from tasks.prompts.layout import PromptLayout
from tasks.prompts.packing import pack
from tasks.prompts.profile import Profile
from tasks.prompts.tokenizer import ModelTokenizer
from tasks.schema import profiles


@dataclass(frozen=True, slots=True)
class ActiveProfile:
    """A profile as one organization uses it."""

    profile: Profile
    layout: PromptLayout
    static_profile_hash: str


class Profiles:
    """Finds an agent's active profile.

    `model_name` is the name the hash chain knows the model by; `salt` is the secret that organizations' salts are
    derived from.
    """

    def __init__(
        self,
        agents: dict[str, Profile],
        tokenizer: ModelTokenizer,
        *,
        model_name: str,
        salt: bytes,
        database: Database,
        keys: KeyWrapper,
    ) -> None:
        self._agents = agents
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._salt = salt
        self._database = database
        self._keys = keys
        self._layouts = {name: PromptLayout(tokenizer, profile.text) for name, profile in agents.items()}
        self._active: dict[tuple[str, str], ActiveProfile] = {}
        self._activating = threading.Lock()

    @property
    def agents(self) -> dict[str, Profile]:
        """Return the profiles by agent name."""
        return dict(self._agents)

    def get(self, organization: str, agent: str) -> ActiveProfile:
        """Return the agent's profile, stored for the workers. Raises UnknownAgent."""
        active = self._active.get((organization, agent))
        if active is not None:
            return active
        if agent not in self._agents:
            raise UnknownAgent(f"no active profile is named {agent!r}")
        with self._activating:
            return self._active.get((organization, agent)) or self._activate(organization, agent)

    def _activate(self, organization: str, agent: str) -> ActiveProfile:
        profile, layout = self._agents[agent], self._layouts[agent]
        parts = [
            ("model", f"{self._model_name}\n{self._tokenizer.fingerprint}".encode()),
            ("tokenizer", self._tokenizer.tokenizer_hash.encode()),
            ("template", self._tokenizer.template_hash.encode()),
            ("template_arguments", self._tokenizer.date.encode() if self._tokenizer.uses_date else b""),
            *((segment.kind, segment.text.encode()) for segment in profile.segments),
        ]
        links = hash_chain(derive(self._salt, "static-profile-hash", organization), parts)
        active = ActiveProfile(profile, layout, links[-1].hash)
        data_key, wrapped = self._keys.new_key(active.static_profile_hash)
        row = {
            "static_profile_hash": active.static_profile_hash,
            "organization": organization,
            "agent_name": agent,
            "version": profile.version,
            "model_fingerprint": self._tokenizer.fingerprint,
            "static_token_count": len(layout.static_token_ids),
            "static_token_ids": seal(data_key, pack(layout.static_token_ids), active.static_profile_hash),
            "data_key": wrapped,
            "activated_at": now(),
        }
        self._database.write(lambda connection: _insert_once(connection, row))
        self._active[(organization, agent)] = active
        return active


def _insert_once(connection: Connection, row: dict[str, object]) -> None:
    """Store the profile unless another gateway process already did: the hash says that it is the same."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    connection.execute(insert(profiles).values(row).on_conflict_do_nothing())
