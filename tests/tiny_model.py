"""A checkpoint small enough to build and load in seconds: a Llama with random weights and a real tokenizer.

Tests need a model that every stage treats as real, from chat template to KV cache, while what it says does not
matter. The files are written directly, so that neither torch nor transformers is needed to make it:

- the tokenizer is a byte-level BPE trained on the text below, with the special tokens of ChatML;
- the weights are drawn from a seeded normal distribution, and written in the safetensors format: the header's
  length in 8 bytes, the header as JSON, then the values. The same seed gives the same file, byte for byte;
- the embeddings of special tokens are zero. As the output head is the embedding, their chance is less than one in a
  million: an answer practically never ends by itself, and a test's `max_tokens` or `stop` decides its length.
"""

from __future__ import annotations

import json
import random
import struct
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LAYERS = 2
HIDDEN = 64
INTERMEDIATE = 128
HEADS = 2  # Heads of 32: the smallest that vLLM's CPU attention supports.
VOCABULARY = 512
CONTEXT = 2048
#: Standard deviations. The usual 0.02 makes so small a model repeat one token; these let it wander.
WEIGHT_SPREAD = 0.2
EMBEDDING_SPREAD = 0.5
NORM_EPSILON = 1e-5

EMBEDDING = "model.embed_tokens.weight"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

TEXT = """\
You are the incident responder of an organization that runs its own accelerators. Read the context, name the cause,
say what you would do next and what you would leave alone. Answer in plain words and do not invent facts.
The queue holds the request, the worker takes it, the engine computes the prompt and streams the answer. If the
worker dies, another worker takes the request again and the reader sees the same answer once more.
The log of the service says: connection refused, retrying in five seconds; disk usage is at ninety percent; the
certificate ends tomorrow; the deployment was rolled back; latency rose after the last change was released.
Überprüfe die Angaben, répondez brièvement, y explique la causa. 0123456789 {"key": "value", "list": [1, 2, 3]}
"""

#: As SmolLM2's: a default system message, then each message between <|im_start|> and <|im_end|>.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: The same, for a model that calls tools, in the manner of Hermes and Qwen.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "You may call these functions:\n<tools>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>\n"
    'Call one with <tool_call>\n{"name": name, "arguments": object}\n</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ message['content'] }}\n</tool_response><|im_end|>\n"
    "{% elif not (tools and loop.first and message['role'] == 'system') %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(directory: Path, seed: int = 0, template: str = CHAT_TEMPLATE) -> Path:
    """Write the checkpoint into `directory`, which is made if missing, and return that directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(TEXT.splitlines(keepends=True), VOCABULARY)
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    ends = {"bos_token_id": ids["<|im_start|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|im_end|>"]}
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
            "chat_template": template,
        },
    )
    _write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": CONTEXT,
            "hidden_act": "silu",
            "rms_norm_eps": NORM_EPSILON,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            **ends,
        },
    )
    _write_json(directory / "generation_config.json", ends)
    _write_weights(directory / "model.safetensors", _shapes(tokenizer.get_vocab_size()), random.Random(seed))
    return directory


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level tokenizer with `vocabulary` tokens, learned from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Return each tensor's name and shape, as LlamaForCausalLM names them; the output head is the embedding."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes |= {
            f"{prefix}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes


def _write_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], rng: random.Random) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    values = array("f")
    for name, shape in shapes.items():
        start = len(values)
        if len(shape) == 1:
            values.extend([1.0] * shape[0])  # Normalisation weights: 1 leaves the scale as it is.
        elif name == EMBEDDING:
            special = len(SPECIAL_TOKENS) * HIDDEN  # The trainer gives special tokens the first ids.
            values.extend([0.0] * special)
            values.extend(rng.gauss(0.0, EMBEDDING_SPREAD) for _ in range(shape[0] * shape[1] - special))
        else:
            values.extend(rng.gauss(0.0, WEIGHT_SPREAD) for _ in range(shape[0] * shape[1]))
        offsets = [start * values.itemsize, len(values) * values.itemsize]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + values.tobytes())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
