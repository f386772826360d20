"""Blocks are named by all that leads up to their end."""

from __future__ import annotations

import hashlib

import pytest

from worker_gpu.engines.block_hashes import RUN_BLOCKS, as_bytes, block_hashes


@pytest.mark.parametrize("count", [0, 15, 16, 17, 16 * RUN_BLOCKS, 16 * RUN_BLOCKS * 2 + 40])
def test_a_hash_covers_the_salt_and_everything_before(count: int) -> None:
    """Whether runs of blocks are remembered or not, the chain is that of one hash after the other."""
    token_ids = list(range(7, 7 + count))
    expected, parent = [], hashlib.sha256(b"salt").digest()
    for start in range(0, count - 15, 16):
        parent = hashlib.sha256(parent + as_bytes(token_ids[start : start + 16])).digest()
        expected.append(parent)
    for _ in ("computed", "remembered"):
        assert block_hashes(token_ids, "salt", 16) == expected


def test_a_change_changes_everything_after_it() -> None:
    """Another token changes its block and those that follow; another salt or block size changes all."""
    prompt = list(range(16 * RUN_BLOCKS + 64))
    original = block_hashes(prompt, "salt", 16)
    for position in (0, 100, len(prompt) - 1):
        changed = block_hashes([*prompt[:position], 99_999, *prompt[position + 1 :]], "salt", 16)
        same = [old == new for old, new in zip(original, changed, strict=True)]
        assert same == [index < position // 16 for index in range(len(original))]
    assert not set(block_hashes(prompt, "other", 16)) & set(original)
    assert not set(block_hashes(prompt, "salt", 8)) & set(original)


def test_what_was_remembered_is_not_changed_by_its_users() -> None:
    """A caller may do what it likes with the list it got."""
    prompt = list(range(16 * RUN_BLOCKS))
    first = block_hashes(prompt, "salt", 16)
    kept = list(first)
    first.clear()
    assert block_hashes(prompt, "salt", 16) == kept
