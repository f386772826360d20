"""The hash chain that names a static prefix.

Each link hashes the one before it together with one more thing that the prefix depends on, from the organization's
salt over the model, tokenizer and template to each segment in turn. Two profiles share a link exactly if everything
up to there is the same, as their KV cache blocks would be. The last link is the `static_profile_hash`.

The organization's salt comes first, so that nobody can tell from a hash whether another organization uses the same
profile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tasks.job import Chain

#: A link inside a profile is named by so many digits of its hash: it travels with messages, and workers keep thousands.
LINK_DIGITS = 32


@dataclass(frozen=True, slots=True)
class Link:
    """One step of the chain: what was added, and the hash (64 hexadecimal digits) of everything so far."""

    label: str
    hash: str


def hash_chain(organization_salt: bytes, parts: Iterable[tuple[str, bytes]]) -> tuple[Link, ...]:
    """Return a link for each (label, content) of `parts`, in order."""
    previous = hashlib.sha256(b"metaqore-static-profile-v1\x00" + organization_salt).digest()
    links = []
    for label, content in parts:
        # Label and content are hashed on their own first: fixed lengths leave no way to shift the border.
        step = hashlib.sha256(label.encode()).digest() + hashlib.sha256(content).digest()
        previous = hashlib.sha256(previous + step).digest()
        links.append(Link(label, previous.hex()))
    return tuple(links)


def stored_chain(stored: Sequence[tuple[str, int, str]] | None) -> Chain:
    """Return the chain that the column `profiles.chain` holds; a gateway of release 0.1.0 stored none."""
    return tuple((link, tokens) for link, tokens, _ in stored or ())
