"""Turn a GGUF file of a Llama-like model with a byte-level tokenizer into a checkpoint in Hugging Face's layout.

GGUF is llama.cpp's format: one file with metadata, tokenizer and tensors, most of them quantised in blocks. Three
things differ from what vLLM reads:

- tensors have other names, and are stored quantised: `gguf` works out their values;
- llama.cpp turns pairs of neighbouring elements by RoPE's angle, Hugging Face elements half a head apart, so the rows
  of the query and key projections were reordered when the GGUF file was made. They are put back here;
- the output head is left out where it is the embedding; `tie_word_embeddings` says so.

Neither torch nor transformers is needed, which is what makes it quick: the time goes into writing the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TokenType, dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EMBEDDING = "token_embd.weight"
OUTPUT_HEAD = "output.weight"
NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    OUTPUT_HEAD: "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: How the kinds of tokenizer that GGUF names cut text before merging: digits one by one, then GPT-2's pattern.
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])
}


def write_checkpoint(source: Path, directory: Path, say: Callable[[str], None]) -> None:
    """Write configuration, tokenizer and weights, in float32, of the GGUF file `source` into `directory`.

    Raises ValueError if the model or its tokenizer is of a kind this does not know.
    """
    reader = GGUFReader(source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture, cut = metadata.get("general.architecture"), metadata.get("tokenizer.ggml.pre")
    if architecture != "llama" or cut not in PRE_TOKENIZERS:
        raise ValueError(f"{source.name} is neither a Llama model nor has it a tokenizer of a known kind")
    names = {tensor.name for tensor in reader.tensors}
    _write_json(directory / "config.json", _config(metadata, tied=OUTPUT_HEAD not in names))
    _write_json(directory / "generation_config.json", _ends(metadata))
    _write_tokenizer(metadata, directory)
    say(f"      reading {len(names)} tensors")
    weights = {_name(tensor.name): _values(tensor, metadata) for tensor in reader.tensors}
    say(f"      writing {sum(values.nbytes for values in weights.values()) / 1e6:.0f} MB")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)


def _name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    match name.split("."):
        case ["blk", block, part, suffix] if part in BLOCK_NAMES:
            return f"model.layers.{block}.{BLOCK_NAMES[part]}.{suffix}"
    raise ValueError(f"a Llama has no tensor {name}")


def _values(tensor: Any, metadata: dict[str, Any]) -> NDArray[np.float32]:
    values = dequantize(tensor.data, tensor.tensor_type)
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    for part, key in heads.items():
        if f".{part}." in tensor.name:
            rows, columns = values.shape
            pairs = values.reshape(metadata[key], rows // metadata[key] // 2, 2, columns)
            values = pairs.swapaxes(1, 2).reshape(rows, columns)
    return np.ascontiguousarray(values, dtype=np.float32)


def _config(metadata: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "max_position_embeddings": metadata["llama.context_length"],
        "hidden_act": "silu",
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        **_ends(metadata),
    }


def _ends(metadata: dict[str, Any]) -> dict[str, int]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: metadata[f"tokenizer.ggml.{key}_token_id"] for name, key in keys.items()}


def _write_tokenizer(metadata: dict[str, Any], directory: Path) -> None:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]] for name, key in ids.items()},
            "clean_up_tokenization_spaces": False,
            "model_max_length": metadata["llama.context_length"],
            "chat_template": metadata["tokenizer.chat_template"],
        },
    )


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
