"""Moves KV blocks between host RAM and their files, in threads: the scheduler that asks for it never waits for a disk.

A job is a number of blocks of one organization. Reading is shared among threads, since a request waits for it. Writing is one
thread's for each job, and begins with the removal of what has to go, so that files never take more than they may. `finished`
tells what became of the jobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from tasks.logs import get_logger
from worker_gpu.engines.disk_tier_files import BlockFiles, BlockUnreadable
from worker_gpu.engines.disk_tier_index import Block

logger = get_logger(__name__)

READERS, WRITERS = 4, 2
#: A block's key, and the number of its place in host RAM.
Place = tuple[bytes, int]
#: What is done with a block: organization, key, memory.
Move = Callable[[str, bytes, memoryview], None]


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a job, or of a part of it: the blocks that were moved and those that were not.

    `erased` tells that the organization's folder was not there. `seconds` are from the job's beginning to the part's end.
    """

    job_id: int
    organization: str
    moved: tuple[bytes, ...]
    failed: tuple[bytes, ...]
    erased: bool
    seconds: float


class Transfers:
    """Reads and writes blocks. `memory` is host RAM's tier, in which a place has `block_bytes`. One thread calls this."""

    def __init__(self, files: BlockFiles, memory: memoryview, block_bytes: int) -> None:
        self._files, self._memory, self._block_bytes = files, memory, block_bytes
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="disk-tier-read")
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="disk-tier-write")
        self._running: set[Future[None]] = set()
        self._ended: SimpleQueue[Ended] = SimpleQueue()
        self._parts: dict[int, list[Ended]] = {}
        self._parts_left: dict[int, int] = {}
        self._refused = False

    def read(self, job_id: int, organization: str, places: Sequence[Place]) -> None:
        """Have blocks read into their places. Files of those that cannot be are removed."""
        shares = [places[first::READERS] for first in range(min(READERS, len(places)))] or [places]
        self._parts[job_id], self._parts_left[job_id] = [], len(shares)
        for share in shares:
            self._submit(self._readers, self._read, job_id, organization, share, time.monotonic())

    def write(self, job_id: int, organization: str, places: Sequence[Place], evicted: Sequence[Block]) -> None:
        """Have blocks written from their places, after others are removed."""
        self._parts[job_id], self._parts_left[job_id] = [], 1
        self._submit(self._writers, self._write, job_id, organization, places, evicted, time.monotonic())

    def remove(self, blocks: Sequence[Block]) -> None:
        """Have blocks removed."""
        self._submit(self._writers, self._remove, blocks)

    def finished(self) -> list[Ended]:
        """Return the jobs that have ended since the last call."""
        finished: list[Ended] = []
        self._running = {future for future in self._running if not future.done()}
        while True:
            try:
                ended = self._ended.get_nowait()
            except Empty:
                return finished
            parts = self._parts[ended.job_id]
            parts.append(ended)
            self._parts_left[ended.job_id] -= 1
            if not self._parts_left[ended.job_id]:
                del self._parts[ended.job_id], self._parts_left[ended.job_id]
                finished.append(_together(parts))

    def wait(self) -> None:
        """Return when all that was begun has ended."""
        wait(self._running)

    def close(self) -> None:
        """End the threads, without what they have not begun, and let go of the memory."""
        for pool in (self._readers, self._writers):
            pool.shutdown(cancel_futures=True)
        self._memory.release()

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[..., None], *arguments: Any) -> None:
        self._running.add(pool.submit(work, *arguments))

    def _read(self, job_id: int, organization: str, places: Sequence[Place], began: float) -> None:
        moved, erased = self._move(self._files.read, organization, places)
        failed = _others(places, moved)
        # A file that nobody knows of would take room for ever.
        self._remove([(organization, key) for key in failed])
        self._ended.put(Ended(job_id, organization, moved, failed, erased, time.monotonic() - began))

    def _write(
        self, job_id: int, organization: str, places: Sequence[Place], evicted: Sequence[Block], began: float
    ) -> None:
        self._remove(evicted)
        moved, erased = self._move(self._files.write, organization, places)
        self._ended.put(Ended(job_id, organization, moved, _others(places, moved), erased, time.monotonic() - began))

    def _move(self, move: Move, organization: str, places: Sequence[Place]) -> tuple[tuple[bytes, ...], bool]:
        """Move blocks one by one; return which could be moved, and whether the organization's folder is gone."""
        moved: list[bytes] = []
        try:
            for key, place in places:
                start = place * self._block_bytes
                try:
                    move(organization, key, self._memory[start : start + self._block_bytes])
                    moved.append(key)
                except FileNotFoundError:
                    if not self._files.has_folder(organization):
                        return tuple(moved), True
                except BlockUnreadable:
                    logger.warning("a block on disk is torn or altered, and is computed anew")
            self._refused = False
        except Exception as error:  # Whatever it is: vLLM waits for the job's end.
            self._complain(error)
        return tuple(moved), False

    def _remove(self, blocks: Sequence[Block]) -> None:
        for organization, key in blocks:
            try:
                self._files.remove(organization, key)
            except OSError as error:
                self._complain(error)

    def _complain(self, error: Exception) -> None:
        """Say that the disk is full or away; once, not for every request."""
        if not self._refused:
            logger.error("the disk tier's disk refuses", error=getattr(error, "strerror", None) or type(error).__name__)
        self._refused = True


def _others(places: Sequence[Place], moved: Sequence[bytes]) -> tuple[bytes, ...]:
    """Return the blocks that were not moved."""
    done = set(moved)
    return tuple(key for key, _ in places if key not in done)


def _together(parts: Sequence[Ended]) -> Ended:
    return Ended(
        parts[0].job_id,
        parts[0].organization,
        tuple(key for part in parts for key in part.moved),
        tuple(key for part in parts for key in part.failed),
        any(part.erased for part in parts),
        max(part.seconds for part in parts),
    )
