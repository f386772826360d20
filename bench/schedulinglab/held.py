"""What a worker's cache holds of each profile, kept up to date by the engine's own events."""

from __future__ import annotations

from bench.schedulinglab.fleet import Fleet, Worker
from bench.schedulinglab.workload import Profile
from worker_gpu.engines.kv_events import AllBlocksCleared, BlockStored, KvEvent


class Held:
    """Follows one worker's cache. A link whose full blocks are all there counts as held whole."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._owners: dict[bytes, str] = {}
        self._blocks: dict[str, list[bytes]] = {}
        self._ends: dict[str, int] = {}
        self._changed: set[str] = set()
        self._known_blocks = 0
        worker.batch.events.subscribe(self._hear)

    def learn(self, fleet: Fleet, profile: Profile, organization: str) -> None:
        """Get to know a profile; nothing of it can be there before."""
        if profile.name in self._blocks:
            return
        hashes, size = fleet.hashes(profile, organization), fleet.options.block_size
        for link, end in profile.links:
            self._blocks[link], self._ends[link] = hashes[: end // size], end
            for block in hashes[: end // size]:
                self._owners.setdefault(block, link)

    @property
    def changed(self) -> bool:
        """Tell whether there is anything to report."""
        return bool(self._changed)

    @property
    def free_tokens(self) -> int:
        """Return how many tokens the cache has beside those of profiles, as worker_gpu/cache tells them."""
        options = self._worker.fleet.options
        return max(0, options.num_blocks - self._known_blocks) * options.block_size

    def tokens_of(self, link: str) -> int:
        """Return how many tokens of a link are held."""
        blocks = self._blocks[link]
        count = self._worker.known(blocks)
        return self._ends[link] if count == len(blocks) else count * self._worker.batch.limits.block_size

    def changes(self) -> dict[str, tuple[int, int, int]]:
        """Return what is held of each link that changed since the last call."""
        held = {link: self.tokens_of(link) for link in self._changed}
        self._changed.clear()
        return {link: (tokens, tokens, tokens) for link, tokens in held.items()}

    def _hear(self, _number: int, event: KvEvent) -> None:
        if isinstance(event, AllBlocksCleared):
            raise TypeError("nobody clears a cache here")
        sign = 1 if isinstance(event, BlockStored) else -1
        for block in event.block_hashes:
            if link := self._owners.get(block):
                self._changed.add(link)
                self._known_blocks += sign
