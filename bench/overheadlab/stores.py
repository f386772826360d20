"""What Redis and the database took in: bytes kept and bytes written, as they count themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import redis
import sqlalchemy as sa

from bench.overheadlab.ours import OurSite
from bench.overheadlab.usage import family
from tasks.queueing.keys import QueueKeys
from tasks.settings import GatewayGroup


class Stores:
    """Reads one installation's counters. A context manager, as it holds connections."""

    def __init__(self, site: OurSite) -> None:
        self._site = site
        self._redis = redis.Redis.from_url(site.site.redis.url)
        # A log that is written anew in between would count for less than was written.
        self._redis.config_set("auto-aof-rewrite-percentage", 0)
        self._engine = sa.create_engine(site.site.database_url, isolation_level="AUTOCOMMIT")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._redis.close()
        self._engine.dispose()

    def counters(self) -> dict[str, float]:
        """Return bytes so far: in Redis's memory, log and network, in the database's tables and log, in our logs.

        `database_log` is PostgreSQL's own count; of SQLite it is what the processes that have it open gave the disk.
        """
        info: Mapping[str, Any] = self._redis.info()
        return {
            # Without what belongs to connections, which come and go.
            "redis_memory": float(info["used_memory"] - info["mem_clients_normal"] - info["mem_aof_buffer"]),
            "redis_aof": float(info["aof_current_size"]),
            "redis_network": float(info["total_net_input_bytes"] + info["total_net_output_bytes"]),
            "redis_commands": float(info["total_commands_processed"]),
            **self._database(),
            "logs": float(sum(log.stat().st_size for log in self._site.site.folder.glob("*.log"))),
        }

    def connections(self) -> dict[str, float]:
        """Return how many connections to Redis and PostgreSQL there are, without those of this class."""
        found = {"redis": float(len(self._redis.client_list()) - 1)}
        if self._engine.dialect.name == "postgresql":
            query = "SELECT COUNT(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            with self._engine.connect() as connection:
                found["postgresql"] = float(connection.execute(sa.text(query)).scalar_one())
        return found

    def queue_bytes(self) -> float:
        """Return what the keys of the queue take of Redis's memory, by its own account."""
        keys = self._redis.scan_iter(QueueKeys(GatewayGroup().key_prefix).named("*"), count=1000)
        return float(sum(self._redis.memory_usage(key, samples=0) or 0 for key in keys))

    def _database(self) -> dict[str, float]:
        with self._engine.connect() as connection:
            if self._engine.dialect.name == "postgresql":
                query = "SELECT pg_database_size(current_database()), pg_current_wal_insert_lsn() - '0/0'"
                size, log = connection.execute(sa.text(query)).one()
                return {"database": float(size), "database_log": float(log)}
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            page_size = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        parts = (self._site.parts[part] for part in ("gateway", "worker", "housekeeper"))
        written = sum(process.io_counters().write_bytes for roots in parts for process in family(roots))
        return {"database": float(page_size * pages), "database_log": float(written)}
