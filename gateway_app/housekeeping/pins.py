"""Telling Redis again what is pinned, where it has lost that, or never heard of it.

A gateway tells Redis of a pin once it is committed, and may die or find Redis away before it does. So SQL is compared with
Redis now and then. Redis is looked at first: whatever it wishes for that SQL does not name after that is pinned no more.
"""

from __future__ import annotations

import redis

from gateway_app.profiles.pinned import pinned_parts
from gateway_app.profiles.wishes import Wishes
from tasks.db import Database
from tasks.errors import QueueUnavailable
from tasks.logs import get_logger

logger = get_logger(__name__)


class PinnedProfiles:
    """What is pinned in SQL, and wished for in Redis."""

    def __init__(self, database: Database, wishes: Wishes) -> None:
        self._database, self._wishes = database, wishes

    def renew(self) -> int:
        """Make the wishes that last the same as the pins; return how many were not.

        Raises DatabaseUnavailable or QueueUnavailable.
        """
        try:
            wished = self._wishes.lasting()
            pinned = self._database.read(pinned_parts)
            missing = [(part, copies) for part, copies in pinned if wished.get(part.static_profile_hash) != copies]
            for part, copies in missing:
                self._wishes.say(part, copies)
            gone = wished.keys() - {part.static_profile_hash for part, _ in pinned}
            for static_profile_hash in gone:
                self._wishes.end(static_profile_hash)
        except redis.ResponseError as error:
            # Redis is there, and takes no more, or somebody else has made something else of the key. Other chores go on.
            logger.error("redis does not take what is pinned", error=type(error).__name__)
            return 0
        except redis.RedisError as error:
            raise QueueUnavailable from error
        return len(missing) + len(gone)
