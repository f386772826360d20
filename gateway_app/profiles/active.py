"""A profile as one organization uses it: its layout in token ids, and the hash that names its static part.

The hash is a chain (tasks/prompts/chain.py). What comes before the first segment (the organization's salt, model,
tokenizer, template) is the same for all of an organization's profiles; its hash is called the base here. While a
base is unchanged, everything that was worked out on it still holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from gateway_app.profiles.rows import Tokenised, store_static_part
from tasks.crypto import KeyWrapper, derive, seal
from tasks.db import Database, now
from tasks.errors import ConfigurationError, ProfileUnusable
from tasks.job import Chain
from tasks.prompts.chain import LINK_DIGITS, hash_chain
from tasks.prompts.layout import PromptLayout
from tasks.prompts.packing import pack
from tasks.prompts.profile import Profile
from tasks.prompts.sharing import MAX_ENDS, Said
from tasks.prompts.tokenizer import ModelTokenizer
from tasks.schema import profiles

#: What requests without an agent have for a profile. No profile could be made like this: it says nothing.
NO_PROFILE = Profile.model_construct(agent="", version=0, description="", extends=None, abstract=False, segments=())
_COLD_LABEL = "cold"


@dataclass(frozen=True, slots=True)
class ActiveProfile:
    """A profile as one organization uses it, with the segments that it inherits."""

    profile: Profile
    layout: PromptLayout
    static_profile_hash: str
    #: The segments inside it that others may share, as `tasks.job.Prompt` has them, and of which kinds they are.
    chain: Chain = ()
    kinds: tuple[str, ...] = ()

    @property
    def static_token_count(self) -> int:
        """Return how many tokens are computed once; 0 if the profile is encoded whole with each request."""
        return len(self.layout.static_token_ids)


class Prefixes:
    """Makes profiles usable with the served model, and stores their static token ids for the workers.

    `model_name` is the name the hash chain knows the model by; `salt` is the secret that organizations' salts are
    derived from.
    """

    def __init__(
        self, tokenizer: ModelTokenizer, *, model_name: str, salt: bytes, database: Database, keys: KeyWrapper
    ) -> None:
        self._tokenizer = tokenizer
        self._salt = salt
        self._database = database
        self._keys = keys
        self._before_segments = (
            ("model", f"{model_name}\n{tokenizer.fingerprint}".encode()),
            ("tokenizer", tokenizer.tokenizer_hash.encode()),
            ("template", tokenizer.template_hash.encode()),
            ("template_arguments", tokenizer.date.encode() if tokenizer.uses_date else b""),
        )

    def base(self, organization: str) -> str:
        """Return the hash (64 hexadecimal digits) of all that the organization's prefixes depend on but their text."""
        return hash_chain(self._salt_of(organization), self._before_segments)[-1].hash

    def tokenised(self, organization: str, active: ActiveProfile) -> Tokenised:
        """Return what tokenising gave, in the form in which it is kept with a version."""
        hashed, count = active.static_profile_hash, active.static_token_count
        return Tokenised(self.base(organization), hashed, count, active.layout.joinable)

    def layout(self, profile: Profile) -> PromptLayout:
        """Tokenise the profile. Raises ConfigurationError if the model's template does not take it."""
        inner = [_said(beginning) for beginning in profile.beginnings(MAX_ENDS)]
        return PromptLayout(self._tokenizer, *_said(profile), inner)

    def usable_layout(self, profile: Profile) -> PromptLayout:
        """Do the same for a profile that a caller wrote or chose. Raises ProfileUnusable."""
        try:
            return self.layout(profile)
        except ConfigurationError as error:
            raise ProfileUnusable(error.detail) from None

    def token_count(self, profile: Profile) -> int:
        """Return about how many tokens the profile's text has, without working out its layout."""
        examples = (said for example in profile.examples for said in (example.user, example.assistant))
        return sum(len(self._tokenizer.encode_plain(text)) for text in (profile.text, *examples))

    def name(self, organization: str, profile: Profile, layout: PromptLayout) -> ActiveProfile:
        """Return the profile under the hash that it has in the organization."""
        segments = ((segment.kind, segment.content) for segment in profile.segments)
        text = ((_COLD_LABEL, b""),) if profile is NO_PROFILE else segments
        links = hash_chain(self._salt_of(organization), (*self._before_segments, *text))
        inner = zip(links[len(self._before_segments) : -1], layout.ends, strict=False)
        ends = [(link, end) for link, end in inner if end]
        chain = tuple((link.hash[:LINK_DIGITS], end) for link, end in ends)
        return ActiveProfile(profile, layout, links[-1].hash, chain, tuple(link.label for link, _ in ends))

    def store(self, organization: str, active: ActiveProfile) -> None:
        """Make the static part known to the workers, unless it is already."""
        this = profiles.c.static_profile_hash == active.static_profile_hash
        known = self._database.read(lambda on: on.execute(sa.select(profiles.c.chain).where(this)).one_or_none())
        if known is None or known.chain is None:
            row = self.row(organization, active)
            self._database.write(lambda connection: store_static_part(connection, row))

    def row(self, organization: str, active: ActiveProfile) -> dict[str, object]:
        """Return what is stored for the workers."""
        data_key, wrapped = self._keys.new_key(active.static_profile_hash)
        ids = active.layout.static_token_ids
        return {
            "static_profile_hash": active.static_profile_hash,
            "organization": organization,
            "agent_name": active.profile.agent,
            "version": active.profile.version,
            "model_fingerprint": self._tokenizer.fingerprint,
            "static_token_count": len(ids),
            "static_token_ids": seal(data_key, pack(ids), active.static_profile_hash),
            "data_key": wrapped,
            "activated_at": now(),
            "chain": [[*link, kind] for link, kind in zip(active.chain, active.kinds, strict=True)],
        }

    def _salt_of(self, organization: str) -> bytes:
        return derive(self._salt, "static-profile-hash", organization)


def _said(profile: Profile) -> Said:
    return profile.text or None, [(example.user, example.assistant) for example in profile.examples]
