"""The only module that reads the environment.

Variables named `METAQORE_GROUP__KEY` are read by pydantic, for `loading.Settings`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

PREFIX = "METAQORE_"
CONFIG_VARIABLE = "METAQORE_CONFIG"
URL_VARIABLE = "METAQORE_URL"

#: Where downloads and converted models are kept: outside the source tree, shared by all checkouts of one user.
CACHE_HOME = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "metaqore-gateway"


def own_variables() -> list[str]:
    """Return the names of all variables with our prefix."""
    return [name for name in os.environ if name.upper().startswith(PREFIX)]


def config_file() -> Path:
    """Return the path of the configuration file, which need not exist."""
    return Path(os.environ.get(CONFIG_VARIABLE, "gateway.json")).expanduser()


def config_file_is_named() -> bool:
    """Tell whether the file was asked for, and is not just the one in the working directory."""
    return CONFIG_VARIABLE in os.environ


def short_urls() -> dict[str, Any]:
    """Return the groups with the URLs that have short names: `REDIS_URL`, `DATABASE_URL` and `METAQORE_URL`."""
    short: dict[str, Any] = {}
    if url := os.environ.get("REDIS_URL"):
        short["gateway"] = {"request_queue_url": url}
    if url := os.environ.get("DATABASE_URL"):
        short["database"] = {"url": url}
    if url := os.environ.get(URL_VARIABLE):
        short["metaqore"] = {"url": url}
    return short


def trace_exporters(*, enabled: bool | None) -> tuple[str, ...]:
    """Return which exporters OpenTelemetry's variables name, none if nothing is to be recorded.

    `enabled` tells whether it is; if it is None, the variables do.
    """
    chosen = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
    endpoint = any(os.environ.get(f"OTEL_EXPORTER_OTLP_{part}ENDPOINT") for part in ("", "TRACES_"))
    wanted = bool(chosen) or endpoint if enabled is None else enabled
    if not wanted or chosen == "none" or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ()
    protocols = [os.environ.get(f"OTEL_EXPORTER_OTLP_{part}PROTOCOL") for part in ("TRACES_", "")]
    grpc = next(filter(None, protocols), "http/protobuf") == "grpc"
    otlp = "otlp_proto_grpc" if grpc else "otlp_proto_http"
    names = [name.strip() for name in (chosen or "otlp").split(",")]
    return tuple(otlp if name == "otlp" else name for name in names if name)
