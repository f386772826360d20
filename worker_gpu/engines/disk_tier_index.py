"""What one engine's disk tier holds, and what has to go for something new: the least recently used.

Blocks of a prompt follow one another, and one is of no use without those before it. Whoever uses a prompt's blocks therefore
says so from the last to the first, so that a prompt is evicted from its end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

Block = tuple[str, bytes]


class DiskIndex:
    """Blocks that are on disk or being written, at most `capacity` together. One thread uses it.

    A block is named by its key, and belongs to one organization: the keys' hashes depend on it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: OrderedDict[bytes, str] = OrderedDict()
        self._writing: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._held) + len(self._writing)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def holds(self, organization: str, key: bytes) -> bool:
        """Tell whether a block can be read."""
        return self._held.get(key) == organization

    def load(self, found: Iterable[Block]) -> list[Block]:
        """Take what was found on disk, the longest unused first; return what is too much."""
        for organization, key in found:
            self._held[key] = organization
        return self._evict()

    def use(self, keys: Iterable[bytes]) -> None:
        """Note a use of those of these blocks that are held; the last one named is the last to go."""
        for key in keys:
            if key in self._held:
                self._held.move_to_end(key)

    def begin(self, organization: str, keys: Iterable[bytes]) -> tuple[list[bytes], list[Block]]:
        """Begin to write those of these blocks that are new, as many as there can be; return them, and what has to go first."""
        new = [key for key in dict.fromkeys(keys) if key not in self._held and key not in self._writing]
        del new[max(0, self.capacity - len(self._writing)) :]
        self._writing |= dict.fromkeys(new, organization)
        return new, self._evict()

    def end(self, key: bytes, *, written: bool) -> None:
        """End the writing of a block, which then is held, or not."""
        organization = self._writing.pop(key)
        if written:
            self._held[key] = organization

    def shrink(self, count: int) -> list[Block]:
        """Hold so many blocks less than now, from now on; return what has to go. For a disk that takes less than was thought."""
        self.capacity = max(0, len(self) - count)
        return self._evict()

    def drop(self, key: bytes) -> bool:
        """Forget a block; tell whether it was held."""
        return self._held.pop(key, None) is not None

    def of(self, organization: str) -> list[bytes]:
        """Return the organization's blocks that are held. Takes time for all that is held."""
        return [key for key, owner in self._held.items() if owner == organization]

    def keys(self) -> list[bytes]:
        """Return all blocks that are held."""
        return list(self._held)

    def _evict(self) -> list[Block]:
        gone: list[Block] = []
        while len(self) > self.capacity and self._held:
            key, organization = self._held.popitem(last=False)
            gone.append((organization, key))
        return gone
