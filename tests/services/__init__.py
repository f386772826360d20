"""Real services for tests: the Redis and the PostgreSQL that come inside two packages from PyPI.

Tests that promise durability need the real thing, killed and restarted. The fixtures that use these are in
`tests/conftest.py`.
"""

from tests.services.helpers import free_port, missing, processes_in, require, wait_until
from tests.services.postgres_server import PostgresServer
from tests.services.redis_server import RedisServer

__all__ = ["PostgresServer", "RedisServer", "free_port", "missing", "processes_in", "require", "wait_until"]
