"""The static parts of prompts, as token ids, read once a profile."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import sqlalchemy as sa

from tasks.crypto import KeyWrapper, unseal
from tasks.db import Database
from tasks.errors import EngineFailed, ModelMismatch
from tasks.prompts.packing import unpack
from tasks.schema import profiles

#: A profile of 2,000 tokens takes 16 KB here.
_KEPT = 1024


class StaticParts:
    """Finds a profile's static token ids by its hash. `fingerprint` is that of this worker's model."""

    def __init__(self, database: Database, keys: KeyWrapper, fingerprint: str) -> None:
        self._database = database
        self._keys = keys
        self._fingerprint = fingerprint
        self._kept: OrderedDict[str, list[int]] = OrderedDict()

    async def token_ids(self, static_profile_hash: str) -> list[int]:
        """Return the ids. Raises ModelMismatch if they were made for another model, EngineFailed if there are none."""
        ids = self._kept.get(static_profile_hash)
        if ids is None:
            ids = await asyncio.get_running_loop().run_in_executor(None, self._load, static_profile_hash)
            self._kept[static_profile_hash] = ids
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(static_profile_hash)
        return ids

    def _load(self, static_profile_hash: str) -> list[int]:
        query = sa.select(profiles).where(profiles.c.static_profile_hash == static_profile_hash)
        row = self._database.read(lambda connection: connection.execute(query).one_or_none())
        if row is None:
            raise EngineFailed("the request's profile is not stored")
        if row.model_fingerprint != self._fingerprint:
            raise ModelMismatch
        return unpack(
            unseal(self._keys.unwrap(row.data_key, static_profile_hash), row.static_token_ids, static_profile_hash)
        )
