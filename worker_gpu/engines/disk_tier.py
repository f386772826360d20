"""The tier below host RAM in vLLM's tiering connector: blocks of KV cache as files, bounded, and apart by organization.

vLLM's own file tier has one folder for all and never shrinks. This one

- writes a block into the folder of the organization whose request computed it, which the worker names with each request
  (`worker_gpu.engines.vllm_tiers`); of a request without one, nothing is written;
- holds at most `max_bytes`: what was used least recently goes first, before anything new is written;
- knows what it holds without asking the disk, so that a lookup costs no system call. At the start it reads the names of the
  files, and tells of them by KV events before the first request;
- seals every block, and takes one that does not unseal for none (`disk_tier_files.py`).

It lives in vLLM's scheduler, whose thread is never made to wait: `disk_tier_io.py` moves the blocks. One that cannot be loaded
is forgotten, and vLLM computes it anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import SecretStr
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from tasks.kv_folders import ORGANIZATION_NAME
from tasks.logs import get_logger
from worker_gpu.engines.disk_tier_files import SEAL_BYTES, BlockFiles, make_room, take_folder
from worker_gpu.engines.disk_tier_grants import Grants
from worker_gpu.engines.disk_tier_index import Block, DiskIndex
from worker_gpu.engines.disk_tier_io import Ended, Transfers
from worker_gpu.engines.vllm_tiers import ORGANIZATION

logger = get_logger(__name__)

#: File systems give whole pages.
PAGE_BYTES = 4096
#: Blocks that are told of in one engine step after the start.
TOLD_AT_ONCE = 1000
#: Blocks that wait to be written keep their places in host RAM; this share of it, at most.
WAITING_SHARE = 0.25
#: The same for those that are on their way to the GPU.
LOADING_SHARE = 0.5
#: As the owner of events: vLLM keeps what it knows of a block until each of its owners has removed it.
OWNER = "disk"


class DiskTier(SecondaryTierManager):  # type: ignore[misc]
    """A secondary tier for vLLM's TieringOffloadingSpec. All methods are called on the scheduler's thread."""

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        directory: str,
        identity: str,
        max_bytes: int,
        secret: SecretStr,
        backpressure_detector: Any = None,
    ) -> None:
        """Take a folder in `directory`, and look what is in it. Raises OSError if that cannot be used.

        `primary_kv_view` is host RAM's tier, a row a block. `identity` changes with what a block's bytes depend on, as far as a
        worker knows it; `secret`, in hexadecimal, is what the organizations' keys are derived from.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        block_bytes: int = self.block_size_bytes
        memory = primary_kv_view.cast("B")
        blocks_in_ram = len(memory) // block_bytes
        self._most_waiting = int(blocks_in_ram * WAITING_SHARE)
        self._grants = Grants(max(1, int(blocks_in_ram * LOADING_SHARE)))
        self._waiting = 0
        folder, self._lock = take_folder(Path(directory), _identity(identity, offloading_spec.config, block_bytes))
        self._files = BlockFiles(folder, bytes.fromhex(secret.get_secret_value()))
        file_bytes = -(-(block_bytes + SEAL_BYTES) // PAGE_BYTES) * PAGE_BYTES
        self._index = DiskIndex(max_bytes // file_bytes)
        for organization, key in self._index.load(self._files.found()):
            self._files.remove(organization, key)
        if not make_room(Path(directory), (self._index.capacity - len(self._index)) * file_bytes):
            logger.warning("the disk has less room than caching.tiers.disk_gib")
        self._transfers = Transfers(self._files, memory, block_bytes)
        self._tells = bool(offloading_spec.kv_events_config.enable_kv_cache_events)
        self._untold = self._index.keys() if self._tells else []
        self._events: list[OffloadingEvent] = []
        self._loads: set[int] = set()

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Make the folder of the request's organization.

        Nothing else makes it: after an organization was erased, what was computed before is not written any more.
        """
        if organization := _organization(req_context):
            try:
                self._files.make_folder(organization)
            except OSError as error:
                logger.error("an organization's folder cannot be made", error=error.strerror)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Note a use of all the request's blocks: those found in faster tiers were never looked for here."""
        # vLLM keeps them in the order of the prompt, and has no public way to ask for all of them.
        self._index.use(reversed(getattr(req_context, "_offload_key_positions", {})))
        self._grants.end(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Note which requests have been begun: those have their blocks."""
        for request_id in context.new_req_ids:
            self._grants.end(request_id)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Tell whether a block can be loaded for this request."""
        found = self._index.holds(_organization(req_context), key) and self._grants.grant(req_context.req_id, key)
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Have the blocks written that are new; none, if others wait for that and they would be too many together."""
        organization = _organization(job_metadata.req_context)
        new: list[bytes] = []
        evicted: list[Block] = []
        many = self._waiting + len(job_metadata.keys) > self._most_waiting
        if organization and not (self._waiting and many):
            new, evicted = self._index.begin(organization, job_metadata.keys)
            self._waiting += len(new)
            self._tell([key for _, key in evicted], removed=True)
        places = _places(job_metadata)
        self._transfers.write(job_metadata.job_id, organization, [(key, places[key]) for key in new], evicted)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Have the blocks read."""
        self._loads.add(job_metadata.job_id)
        organization = _organization(job_metadata.req_context)
        self._transfers.read(job_metadata.job_id, organization, list(_places(job_metadata).items()))

    def get_finished_jobs(self) -> list[JobResult]:
        """Note in the index what has ended, and return it."""
        return [self._note(ended) for ended in self._transfers.finished()]

    def has_pending_work(self) -> bool:
        """Tell that the engine must step, since there is something to tell of, though nobody asks for anything."""
        return bool(self._untold or self._events)

    def take_events(self) -> Iterator[OffloadingEvent]:
        """Return what to tell of."""
        # Some may have gone before they were told of.
        self._tell([key for key in self._untold[:TOLD_AT_ONCE] if key in self._index], removed=False)
        del self._untold[:TOLD_AT_ONCE]
        events, self._events = self._events, []
        yield from events

    def drain_jobs(self) -> None:
        """Wait until nothing reads or writes."""
        self._transfers.wait()

    def shutdown(self) -> None:
        """End the threads, and let go of host RAM's tier, which is unmapped next."""
        self._transfers.close()
        self._primary_kv_view.release()

    def _note(self, ended: Ended) -> JobResult:
        if ended.job_id in self._loads:
            self._loads.discard(ended.job_id)
            lost = list(ended.failed)
        else:
            self._waiting -= len(ended.moved) + len(ended.failed)
            for key in ended.failed:
                self._index.end(key, written=False)
            for key in reversed(ended.moved):
                self._index.end(key, written=True)
            self._tell(ended.moved, removed=False)
            lost = []
            if ended.failed and not ended.erased:
                evicted = self._index.shrink(len(ended.failed))
                self._transfers.remove(evicted)
                self._tell([key for _, key in evicted], removed=True)
        if ended.erased:
            lost += self._index.of(ended.organization)
        self._tell([key for key in lost if self._index.drop(key)], removed=True)
        return JobResult(
            ended.job_id,
            success=not ended.failed,
            successful_keys=ended.moved or None,
            transfer_time=ended.seconds,
            transfer_bytes=len(ended.moved) * self.block_size_bytes,
        )

    def _tell(self, keys: Iterable[bytes], *, removed: bool) -> None:
        if self._tells and (told := [OffloadKey(key) for key in keys]):
            self._events.append(
                OffloadingEvent(told, self.medium, removed, ownership=OWNER, removal_expected=True),
            )


def _identity(identity: str, config: Any, block_bytes: int) -> str:
    """Return 16 hexadecimal digits that change with anything a block's bytes depend on: also with what only the engine knows."""
    layout = (
        config.groups,
        config.model.dtype,
        config.cache,
        config.kv_cache_layout,
        config.canonical_layout,
        block_bytes,
    )
    shape = replace(config.parallel, rank=0, data_parallel_index=0, data_parallel_rank_local=None)
    machine = (current_platform.get_device_name(), torch.backends.cpu.get_cpu_capability())
    return hashlib.sha256(repr((identity, layout, shape, machine)).encode()).hexdigest()[:16]


def _organization(context: ReqContext) -> str:
    """Return the name of the folder of a request's organization, or "" if the request does not say."""
    name = (context.kv_transfer_params or {}).get(ORGANIZATION)
    return name if isinstance(name, str) and ORGANIZATION_NAME.fullmatch(name) else ""


def _places(job: TransferJob) -> dict[bytes, int]:
    """Return the place in host RAM of each block of a job."""
    return dict(zip(job.keys, map(int, job.chunk_ids), strict=True))
