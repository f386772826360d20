"""vLLM with host RAM and disk below a KV cache that holds hardly more than one prompt: on the CPU, with a tiny model.

Two engines, one after the other, over the same disk: the tests of a module run in their order, and each goes on where the one
before it stopped. Answers are compared with those of the first time, when nothing was cached.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from tasks.errors import ConfigurationError
from tasks.kv_folders import erase, organization_folder
from tasks.prompts.radix import Depths
from tasks.settings import CachingGroup, EngineGroup, SecretsGroup, Settings, TiersGroup
from tests.services import wait_until
from tests.tiny_model import make_tiny_model
from tests.worker_gpu.engines.vllm_host import Host, text
from worker_gpu.cache.blocks import HeldBlocks
from worker_gpu.engines import create_engine
from worker_gpu.engines.vllm import VllmEngine
from worker_gpu.engines.vllm_tiers import (
    SHARED_MEMORY,
    engine_identity,
    forget_shared_memory,
    request_arguments,
    tier_arguments,
)

pytestmark = pytest.mark.vllm

BLOCK, BLOCK_BYTES = 32, 32768  # Two layers, keys and values of two heads of 32 numbers of 4 bytes, for 32 tokens.
WHOLE = 992  # Tokens of a prompt's whole blocks: 31.
GPU_BLOCKS, RAM_BLOCKS, DISK_BLOCKS = 46, 80, 140
FILE_BYTES = 36864  # What a block takes on disk: it is a little more than eight pages.
GIB = 2**30
EVENTS_S = 60.0


def prompt(number: int) -> list[int]:
    """Return the so-many-th prompt of 1,000 tokens; none begins like another."""
    return [10 + (index * 7 + number * 131 + index * index * number % 97) % 400 for index in range(1000)]


class Tiered:
    """An engine with tiers, the tokens it found by the tier they came from, and what it answered at first."""

    def __init__(self, model: Path, disk: Path) -> None:
        self.disk = disk
        self.first: dict[tuple[int, str], str] = {}
        self.sources: Counter[str] = Counter()
        self._settings = Settings(
            engine=EngineGroup(
                model=str(model),
                dtype="float32",
                max_num_seqs=2,
                max_model_len=1408,
                kv_cache_gib=0.01,
                options={"num_gpu_blocks_override": GPU_BLOCKS},
            ),
            caching=CachingGroup(
                tiers=TiersGroup(
                    ram_gib=(RAM_BLOCKS + 0.5) * BLOCK_BYTES / GIB,
                    disk_gib=(DISK_BLOCKS + 0.5) * FILE_BYTES / GIB,
                    disk_directory=disk,
                )
            ),
            secrets=SecretsGroup(master_key=SecretStr("11" * 32)),
        )
        self._start()

    def _start(self) -> None:
        engine = create_engine(self._settings)
        assert isinstance(engine, VllmEngine)
        self.held = HeldBlocks(lambda _blocks: None, lambda: None)
        engine.subscribe(self.held.apply)
        self.host = Host(engine)
        self.host.run(engine.start())
        measured, add = engine._tiers, engine._tiers.add

        def noted(hits: Mapping[Any, int], connector: Mapping[str, Any] | None) -> None:
            self.sources.update({str(source.value): count for source, count in hits.items()})
            add(hits, connector)

        measured.add = noted  # type: ignore[method-assign,assignment]

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self.host.run(self.host.engine.stop())
        self.host.close()

    def ask(self, number: int, salt: str = "a") -> tuple[int, Counter[str]]:
        """Return how many tokens were found in all, and how many in which slower tier. The answer must be as at first."""
        before = Counter(self.sources)
        deltas = self.host.ask(prompt(number), salt=salt, max_tokens=8)
        assert self.first.setdefault((number, salt), text(deltas)) == text(deltas)
        self.settle()
        return deltas[0].cached_tokens, self.sources - before

    def known(self, number: int, salt: str = "a") -> Depths:
        """Return how many tokens of a prompt the engine's events have told to be on the GPU, or at least in RAM, or on disk."""
        gpu, ram, disk = self.held.leading(self.host.engine.block_hashes(prompt(number), salt))
        return gpu * BLOCK, ram * BLOCK, disk * BLOCK

    def wait_until_known(self, is_so: Callable[[Depths], bool], number: int, salt: str = "a") -> None:
        """Wait until the events have told this of a prompt: they come a moment after the answer."""
        wait_until(lambda: is_so(self.known(number, salt)), EVENTS_S, f"events; it is {self.known(number, salt)}")

    def files(self, salt: str = "a") -> list[Path]:
        """Return an organization's blocks on disk."""
        return sorted(self.disk.glob(f"*/{organization_folder(salt)}/*.kv"))

    def settle(self) -> None:
        """Wait until the engine, which copies on after an answer, has nothing to do."""
        llm = self.host.engine._llm
        self.host.run(llm.pause_generation(mode="wait", clear_cache=False))
        self.host.run(llm.resume_generation())


@pytest.fixture(scope="module")
def tiered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiered]:
    """Start the first engine; its settings in the environment do not outlive this module."""
    environment = dict(os.environ)
    folder = tmp_path_factory.mktemp("tiers")
    tiered = Tiered(make_tiny_model(folder / "tiny"), folder / "kv")
    try:
        yield tiered
    finally:
        tiered.stop()
        os.environ.clear()
        os.environ.update(environment)


def test_host_ram_leaves_no_file_that_could_stay(tiered: Tiered) -> None:
    """A killed engine gives its memory back, as nothing names it any more."""
    assert not list(SHARED_MEMORY.glob("vllm_offload_metaqore-*"))


def test_what_the_gpu_forgot_comes_back_from_ram(tiered: Tiered) -> None:
    """The second prompt pushes the first out of the cache."""
    assert tiered.ask(1) == (0, {})
    assert tiered.ask(2) == (0, {})
    tiered.wait_until_known(lambda known: known[0] < known[1] == known[2] == WHOLE, 1)
    found, sources = tiered.ask(1)
    assert found == WHOLE
    assert sources["host"] > WHOLE / 2
    assert not sources["disk"]


def test_what_ram_forgot_comes_back_from_disk(tiered: Tiered) -> None:
    """Two more prompts are all that RAM and cache hold together, nearly."""
    assert [tiered.ask(number) for number in (3, 4)] == [(0, {})] * 2
    tiered.wait_until_known(lambda known: known[0] <= known[1] < known[2] == WHOLE, 1)
    found, sources = tiered.ask(1)
    assert found == WHOLE
    assert sources["disk"] > 0


def test_another_organization_finds_nothing(tiered: Tiered) -> None:
    """The same prompt, computed anew, into a folder of its own."""
    assert not tiered.files("b")
    assert tiered.ask(3, "b") == (0, {})
    assert len(tiered.files("b")) == WHOLE // BLOCK
    assert tiered.first[3, "b"] == tiered.first[3, "a"]


def test_the_disk_never_takes_more_than_it_may(tiered: Tiered) -> None:
    """Five prompts are more than it holds: of the one that was used least recently the end has gone."""
    assert len(tiered.files("a")) + len(tiered.files("b")) == DISK_BLOCKS
    assert len(tiered.files("b")) == WHOLE // BLOCK


def test_rates_are_measured(tiered: Tiered) -> None:
    """Disk is slower than RAM, of which it is a part."""
    rates = tiered.host.engine.tier_rates
    assert rates.ram > rates.disk > 0


def test_a_restart_finds_what_is_on_disk(tiered: Tiered) -> None:
    """RAM is empty then. The engine tells what the disk holds before anybody asks."""
    tiered.restart()
    tiered.wait_until_known(lambda known: known == (0, 0, WHOLE), 3, "b")
    assert tiered.ask(3, "b") == (WHOLE, {"disk": WHOLE})


def test_a_torn_file_is_no_block(tiered: Tiered) -> None:
    """What is before it comes from disk, the rest is computed, and written anew."""
    files = tiered.files("a")
    for file in files[::2]:
        file.write_bytes(file.read_bytes()[:-1])
    found, _ = tiered.ask(4)
    assert found < WHOLE
    assert len(tiered.files("a")) >= WHOLE // BLOCK


def test_an_organization_is_erased_while_the_engine_runs(tiered: Tiered) -> None:
    """The engine finds out when it wants its blocks, computes anew, and keeps the new ones."""
    erased = erase(tiered.disk, [organization_folder("a")])
    assert erased.files > WHOLE // BLOCK
    assert [tiered.ask(number) for number in (1, 2)] == [(0, {})] * 2
    assert len(tiered.files("a")) == 2 * WHOLE // BLOCK
    # Of what else was there it may know so only when it wants it: the answer, which this compares, is the same.
    tiered.ask(3)


def configured(directory: Path, ram_gib: float = 0.001, disk_gib: float = 0.001) -> Settings:
    """Return settings with tiers, of a model that is any folder."""
    return Settings(
        engine=EngineGroup(model=str(directory)),
        caching=CachingGroup(tiers=TiersGroup(ram_gib=ram_gib, disk_gib=disk_gib, disk_directory=directory / "kv")),
        secrets=SecretsGroup(master_key=SecretStr("12" * 32)),
    )


def test_what_vllm_is_told(tmp_path: Path) -> None:
    """Nothing that it prints of its configuration shows the key; a request names its organization, in its own way."""
    settings = configured(tmp_path)
    connector = tier_arguments(settings, on_cpu=False)["kv_transfer_config"]
    (disk,) = connector.kv_connector_extra_config["secondary_tiers"]
    assert disk["secret"].get_secret_value() not in repr(connector)
    assert len(bytes.fromhex(disk["secret"].get_secret_value())) == 32
    assert connector.kv_load_failure_policy == "recompute"
    asked = request_arguments(settings, "salt")
    assert asked == {"kv_transfer_params": {"organization": organization_folder("salt")}}
    no_disk = configured(tmp_path, disk_gib=0)
    assert (
        "secondary_tiers" not in tier_arguments(no_disk, on_cpu=False)["kv_transfer_config"].kv_connector_extra_config
    )
    assert request_arguments(no_disk, "salt") is None
    assert tier_arguments(configured(tmp_path, 0, 0), on_cpu=False) == {}


def test_blocks_of_another_engine_are_not_found(tmp_path: Path) -> None:
    """Other weights, other options, another key: another folder."""
    settings = configured(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def identity(settings: Settings = settings, secret: bytes = b"1") -> str:
        return engine_identity(settings, secret)

    first = identity()
    assert identity() == first
    options = EngineGroup(model=str(tmp_path), options={"kv_cache_dtype": "fp8"})
    changed = {identity(secret=b"2"), identity(settings.model_copy(update={"engine": options}))}
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert len({first, identity(), *changed}) == 4


@pytest.mark.parametrize(
    ("ram_gib", "what"), [(10**6, "ram_gib: .* GiB left"), (0.001, "disk_directory: .* cannot be made")]
)
def test_no_room_stops_the_start(tmp_path: Path, ram_gib: float, what: str) -> None:
    """With a word that helps."""
    (tmp_path / "kv").write_text("a file")
    with pytest.raises(ConfigurationError, match=what):
        tier_arguments(configured(tmp_path, ram_gib), on_cpu=False)


def test_old_shared_memory_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine left that was killed while it started; another's that starts now stays."""
    monkeypatch.setattr("worker_gpu.engines.vllm_tiers.SHARED_MEMORY", tmp_path)
    for name, age_s in (("metaqore-1", 0), ("metaqore-2", 0), ("metaqore-3", 4000), ("other", 4000)):
        path = tmp_path / f"vllm_offload_{name}.mmap"
        path.touch()
        os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    forget_shared_memory("metaqore-1")
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["vllm_offload_metaqore-2", "vllm_offload_other"]
