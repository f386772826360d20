"""Celery's remote control: what would do harm, and what reaches every worker's host (`erase_kv`).

`app.control.revoke`, and Flower's buttons, cancel the request.

Celery itself would remember the id in each worker's memory and drop the message when it comes, without a record; and to
terminate a running task it asks the pool, which runs none. Every worker hears of a revoke, and each cancels the request in
the database, which one of them does first; so the request ends as by `DELETE`, with its record, wherever it is.
"""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command, nok, ok
from kombu.utils.functional import maybe_list

from tasks.kv_folders import ORGANIZATION_NAME, erase
from tasks.logs import get_logger
from tasks.settings import settings

logger = get_logger(__name__)
#: Of one command, so many ids are looked up at most.
_MAX_IDS = 1000


@control_command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
def revoke(state: Any, task_id: Any, **_how: Any) -> dict[str, str]:
    """Cancel requests by their ids, whether they wait or run; `terminate` and `signal` change nothing."""
    ids = [one for one in maybe_list(task_id) or [] if isinstance(one, str)][:_MAX_IDS]
    logger.info("cancelling revoked requests", count=len(ids))
    state.consumer.runtime.revoke(ids)
    return dict(ok(f"cancelling {len(ids)} requests"))


@control_command(  # type: ignore[untyped-decorator]
    name="terminate", variadic="task_id", args=[("signal", str)], signature="<signal> [id1 [id2 [... [idN]]]]"
)
def terminate(state: Any, signal: Any, task_id: Any, **_how: Any) -> dict[str, str]:
    """Cancel requests by their ids, as `revoke` does; there is no process to send the signal to."""
    del signal
    cancelling: dict[str, str] = revoke(state, task_id)
    return cancelling


@control_command(name="revoke_by_stamped_headers", variadic="headers")  # type: ignore[untyped-decorator]
def revoke_by_stamped_headers(state: Any, headers: Any, **_how: Any) -> dict[str, str]:
    """Do nothing: requests bear no stamps."""
    del state, headers
    return dict(ok("requests bear no stamps"))


@control_command(name="erase_kv", variadic="folders", signature="[folder1 [folder2 [... [folderN]]]]")  # type: ignore[untyped-decorator]
def erase_kv(state: Any, folders: Any, **_how: Any) -> dict[str, Any]:
    """Erase from this host's disk the KV blocks of organizations, which are named by their folders (`tasks.kv_folders`)."""
    del state
    names = [one for one in maybe_list(folders) or [] if isinstance(one, str) and ORGANIZATION_NAME.fullmatch(one)]
    try:
        erased = erase(settings().caching.tiers.disk_directory, names[:_MAX_IDS])
    except OSError as error:
        logger.error("KV blocks cannot be erased", error=error.strerror)
        return dict(nok(f"KV blocks cannot be erased: {error.strerror}"))
    logger.info("KV blocks erased", count=erased.files)
    return dict(ok({"files": erased.files, "bytes": erased.bytes}))
