"""vLLM's tiers below the KV cache, on plain processors.

vLLM's tiering connector runs on accelerators only: everything in it works here too, but for the copy between the KV cache and
the tier below, which is made by CUDA. A plain copy in its place lets tests and machines without an accelerator run the very
tiers that a GPU worker runs. Here the "GPU" cache and the RAM tier are both host memory: the tier is worth its copy only
where it is larger than the cache.
"""

from __future__ import annotations

import time

import torch
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CpuTiers(TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's tiers, with a copy that needs no accelerator."""

    _worker: OffloadingWorker | None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """Return what copies between the KV cache and the RAM tier. Raises ValueError for what the copy does not know."""
        if self._worker is None:
            if self.blocks_per_chunk != 1 or self.config.canonical_layout:
                raise ValueError("without an accelerator, the RAM tier keeps single blocks in the cache's own layout")
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = Copier(kv_caches, region)
        return self._worker


class Copier(OffloadingWorker):  # type: ignore[misc]
    """Copies blocks at once, when it is told to; so what it is asked for is finished when it returns."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        """Take the cache's tensors, each (blocks, bytes of a block's page), and the tier's memory, a row a block."""
        self._region = region
        self._groups = kv_caches.group_data_refs
        self._cache = [each.tensor.view(torch.int8).view(-1, each.page_size_bytes) for each in kv_caches.tensors]
        self._tier = [region.create_next_worker_view(each.page_size_bytes) for each in kv_caches.tensors]
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Copy from the cache into the tier."""
        return self._copy(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Copy from the tier into the cache."""
        return self._copy(job_id, dst_spec, src_spec, store=False)

    def get_finished(self) -> list[TransferResult]:
        """Return what was copied since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Return: all is copied by now."""

    def shutdown(self) -> None:
        """Let go of the memory."""
        self._tier.clear()
        self._region.cleanup()

    def _copy(self, job_id: int, cache: GPULoadStoreSpec, tier: BlockIDsLoadStoreSpec, *, store: bool) -> bool:
        """Copy the blocks of each group, which follow one another in both lists, in all the tensors that the group has."""
        began, copied, first = time.perf_counter(), 0, 0
        for size, references in zip(cache.group_sizes, self._groups, strict=True):
            blocks, rows = (torch.from_numpy(one.block_ids[first : first + size]).long() for one in (cache, tier))
            for reference in references:
                in_cache, in_tier = self._cache[reference.tensor_idx], self._tier[reference.tensor_idx]
                width = reference.page_size_bytes
                if store:
                    in_tier[rows, :width] = in_cache[blocks, :width]
                else:
                    in_cache[blocks, :width] = in_tier[rows, :width]
                copied += size * width
            first += size
        self._finished.append(TransferResult(job_id, True, copied, time.perf_counter() - began))
        return True
