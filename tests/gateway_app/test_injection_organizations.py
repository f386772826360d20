"""Organizations that run the same profile cannot tell: neither by its hash nor by what the engine has cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from gateway_app.profiles.active import Prefixes
from tasks.job import Job, Prompt, Sampling
from tests.gateway_app.prompt_turns import Model
from tests.tiny_model import CHAT_TEMPLATE
from worker_gpu.asking import generation_request
from worker_gpu.engines.block_hashes import block_hashes


def test_organizations_do_not_share_a_hash(tmp_path: Path) -> None:
    """The same profile has another name in another organization, so neither learns what the other runs."""
    chat = Model(tmp_path, CHAT_TEMPLATE)
    prefixes = Prefixes(
        chat.tokenizer, model_name="m", salt=b"s" * 32, database=cast("Any", None), keys=cast("Any", None)
    )
    acme, again, umbrella = (
        prefixes.name(organization, chat.profile, chat.active.layout).static_profile_hash
        for organization in ("acme", "acme", "umbrella")
    )
    assert acme == again
    assert acme != umbrella


def test_organizations_do_not_share_cached_blocks() -> None:
    """The worker salts the engine's cache by the organization that the signed message names."""
    salts = [salt_of(organization) for organization in ("acme", "acme", "umbrella")]
    assert salts[0] == salts[1]
    acme, umbrella = (block_hashes(list(range(512)), salt, 16) for salt in salts[1:])
    assert not set(acme) & set(umbrella)


def salt_of(organization: str) -> str:
    """Return the cache salt that a worker gives the engine with this organization's request."""
    job = Job("gw_1", 1, organization, Prompt("a" * 64, (4, 5), 5), Sampling(), 0.0, b"k" * 32)
    return generation_request(job, 1, [1, 2, 3], b"salt" * 8).cache_salt
