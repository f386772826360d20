"""Checkpoints for measuring: one whose answers all have the length that was asked for, and one that is only a shape.

Two systems can be compared by tokens a second only if both make equally many. The gateway passes no wish to ignore the
end of an answer, so the checkpoint is told another end: a special token that the model never says.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.settings import DEFAULT_MODEL
from worker_gpu.models import smollm2

#: Published shapes, as vLLM reads them from a configuration. The vocabulary is the tokenizer's.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
}
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
REWRITTEN = ("config.json", "generation_config.json", "tokenizer_config.json")
#: Kernels want a vocabulary that divides well.
VOCABULARY_MULTIPLE = 128


def add_model_options(parser: ArgumentParser) -> None:
    """Let a benchmark be told which model to measure, and in which shape."""
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="a checkpoint; default: SmolLM2-135M, which is prepared if missing"
    )
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="take only the tokenizer from the model; wants load_format dummy"
    )


def model_folder(chosen: Path | None) -> Path:
    """Return the checkpoint that was chosen, or the small model, which is prepared if it is missing."""
    if chosen is None and not smollm2.is_prepared(DEFAULT_MODEL):
        smollm2.prepare(DEFAULT_MODEL)
    return chosen or DEFAULT_MODEL


def endless(source: Path, folder: Path) -> Path:
    """Make a checkpoint in `folder` that is `source` but for the end of its answers; large files are linked."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.name not in REWRITTEN:
            (folder / file.name).symlink_to(file.resolve())
    token, token_id = _never_said(source)
    for name in REWRITTEN:
        if (source / name).exists():
            content = _read(source / name)
            content |= {"eos_token": token} if name.startswith("tokenizer") else {"eos_token_id": token_id}
            _write(folder / name, content)
    return folder


def shape_only(name: str, tokenizer: Path, folder: Path) -> Path:
    """Make a checkpoint without weights in `folder`, to be loaded with random ones: `load_format` must be `dummy`."""
    endless(tokenizer, folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    known = _read(folder / "config.json")
    vocabulary = -(-int(known["vocab_size"]) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    ends = {key: value for key, value in known.items() if key in ENDS}
    _write(folder / "config.json", {**SHAPES[name], "vocab_size": vocabulary, **ends})
    return folder


def _never_said(source: Path) -> tuple[str, int]:
    """Return the last special token that neither begins, ends nor fills a text."""
    config = _read(source / "tokenizer_config.json")
    used = [config.get(f"{name}_token") for name in ("bos", "eos", "pad")]
    names = {token["content"] if isinstance(token, dict) else token for token in used}
    special = [
        (str(token["content"]), int(token["id"]))
        for token in _read(source / "tokenizer.json")["added_tokens"]
        if token["special"] and token["content"] not in names
    ]
    if not special:
        raise SystemExit(f"{source} has no special token that could stand for an end that never comes")
    return special[-1]


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
