"""The static parts of prompts, read once a profile: their token ids, and the segments that other profiles may share."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from tasks.crypto import KeyWrapper, unseal
from tasks.db import Database
from tasks.errors import EngineFailed, ModelMismatch
from tasks.job import Chain
from tasks.prompts.chain import stored_chain
from tasks.prompts.packing import unpack
from tasks.schema import profiles

#: A profile of 2,000 tokens takes 16 KB here.
_KEPT = 1024


@dataclass(frozen=True, slots=True)
class StaticPart:
    """What every prompt with a profile begins with, and whose profile it is.

    `chain` are the segments inside it: each link's hash (32 hexadecimal digits), with how many of `token_ids` go up to
    that segment's end, growing. The profile's own hash, which stands for all of `token_ids`, is not in it.
    """

    token_ids: Sequence[int] = field(repr=False)
    chain: Chain = ()
    organization: str = ""


class StaticParts:
    """Finds a profile's static part by its hash. `fingerprint` is that of this worker's model."""

    def __init__(self, database: Database, keys: KeyWrapper, fingerprint: str) -> None:
        self._database = database
        self._keys = keys
        self._fingerprint = fingerprint
        self._kept: OrderedDict[str, StaticPart] = OrderedDict()

    async def get(self, static_profile_hash: str) -> StaticPart:
        """Return the part. Raises ModelMismatch if it was made for another model, EngineFailed if it is not stored."""
        part = self._kept.get(static_profile_hash)
        if part is None:
            part = await asyncio.get_running_loop().run_in_executor(None, self._load, static_profile_hash)
            self._kept[static_profile_hash] = part
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(static_profile_hash)
        return part

    def _load(self, static_profile_hash: str) -> StaticPart:
        query = sa.select(profiles).where(profiles.c.static_profile_hash == static_profile_hash)
        row = self._database.read(lambda connection: connection.execute(query).one_or_none())
        if row is None:
            raise EngineFailed("the request's profile is not stored")
        if row.model_fingerprint != self._fingerprint:
            raise ModelMismatch
        data_key = self._keys.unwrap(row.data_key, static_profile_hash)
        token_ids = unpack(unseal(data_key, row.static_token_ids, static_profile_hash))
        return StaticPart(token_ids, stored_chain(row.chain), row.organization)
