"""All configuration.

Values come from, strongest first: `REDIS_URL`, `DATABASE_URL` and `METAQORE_URL`; variables named `METAQORE_GROUP__KEY`;
`gateway.json` in the working directory (or the file `METAQORE_CONFIG` names); the groups' defaults. An unknown key
or a bad value raises ConfigurationError, which stops the start.

`serving`, `governance`, `observability` and `secrets` declare the groups; `environment` alone reads the environment;
`loading` makes the whole of them and of the file.
"""

from __future__ import annotations

from tasks.settings.environment import CACHE_HOME, CONFIG_VARIABLE, PREFIX
from tasks.settings.governance import GovernanceGroup, MetaqoreGroup, ProfilesGroup
from tasks.settings.loading import Settings, load, settings
from tasks.settings.observability import LogsGroup, TracingGroup
from tasks.settings.secrets import KEY_BYTES, SECRET_NAMES, SecretsGroup
from tasks.settings.serving import (
    DEFAULT_MODEL,
    CachingGroup,
    DatabaseGroup,
    EngineGroup,
    GatewayGroup,
    SchedulingGroup,
    StreamingGroup,
    TiersGroup,
)

__all__ = [
    "CACHE_HOME",
    "CONFIG_VARIABLE",
    "DEFAULT_MODEL",
    "KEY_BYTES",
    "PREFIX",
    "SECRET_NAMES",
    "CachingGroup",
    "DatabaseGroup",
    "EngineGroup",
    "GatewayGroup",
    "GovernanceGroup",
    "LogsGroup",
    "MetaqoreGroup",
    "ProfilesGroup",
    "SchedulingGroup",
    "SecretsGroup",
    "Settings",
    "StreamingGroup",
    "TiersGroup",
    "TracingGroup",
    "load",
    "settings",
]
