"""The model's tokenizer and chat template, read from its checkpoint without loading the model.

Two encoders are kept. The trusted one knows the control tokens and is only ever given what the template wrote. The
plain one knows none: whatever it encodes is text, even if it spells `<|im_end|>`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram

from tasks.errors import ConfigurationError, InvalidRequest

FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja")
Message = Mapping[str, Any]
_A_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


class TemplateRefused(InvalidRequest):
    """The model's chat template refuses these messages."""

    code = "template_refused"
    hint = "Each model's template has rules for the order of roles; most want the system message first."


class _Refusal(jinja2.TemplateError):
    """A template's author called raise_exception."""


class ModelTokenizer:
    """Renders messages with the model's chat template and turns text into token ids.

    `fingerprint` (64 hexadecimal digits) changes with anything that token ids depend on: gateway and workers compare
    it. `max_model_len` is the context window in tokens that the checkpoint declares.
    """

    def __init__(self, directory: Path) -> None:
        try:
            content = (directory / "tokenizer.json").read_text("utf-8")
            config = _read_json(directory / "tokenizer_config.json")
            model = _read_json(directory / "config.json")
            description = json.loads(content)
            self._trusted = Tokenizer.from_str(content)
            self._plain = Tokenizer.from_str(json.dumps({**description, "added_tokens": [], "post_processor": None}))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"the tokenizer in {directory} cannot be read: {error}") from None
        except Exception as error:  # tokenizers raises bare Exception for a file it does not understand
            raise ConfigurationError(f"the tokenizer in {directory} is not one this version knows: {error}") from None
        for encoder in (self._trusted, self._plain):
            encoder.no_truncation()
            encoder.no_padding()
            if isinstance(encoder.model, BPE | Unigram):
                # It remembers 10,000 words for each thread that ever encoded one, and the gateway has hundreds of threads.
                encoder.model._resize_cache(0)  # noqa: SLF001  there is no public way
        source = _template_source(directory, config)
        self._special = _control_token_pattern(description["added_tokens"])
        self._ids = {token["content"]: token["id"] for token in description["added_tokens"]}
        self._variables = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token")}
        self._today = datetime.now(UTC)
        self.uses_date = "strftime_now" in source
        self._template = _compile(source, self._strftime_now, directory)
        self.max_model_len = int(
            model.get("max_position_embeddings") or model.get("text_config", {}).get("max_position_embeddings") or 2048
        )
        self.template_hash = hashlib.sha256(source.encode()).hexdigest()
        self.tokenizer_hash = hashlib.sha256(content.encode()).hexdigest()
        self.fingerprint = hashlib.sha256(
            f"{self.tokenizer_hash}\n{json.dumps(model, sort_keys=True)}".encode()
        ).hexdigest()

    @property
    def date(self) -> str:
        """Return the date that templates which ask for one are given: that of the start, so that prefixes hold."""
        return self._today.date().isoformat()

    @functools.cached_property
    def supports_tools(self) -> bool:
        """Tell whether the template shows tools to the model: it then renders differently with one."""
        messages = [{"role": "user", "content": "x"}]
        return self.render(messages) != self.render(messages, [_A_TOOL])

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Return the prompt text for `messages`, up to where the assistant speaks.

        Raises TemplateRefused if the template refuses the messages, as some do with roles that do not alternate.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=tools, documents=None, **self._variables
            )
        except _Refusal as error:
            raise TemplateRefused(f"the model's chat template refuses the messages: {error.message}") from None
        except Exception as error:  # whatever a template's author did not think of; its text may quote the messages
            raise TemplateRefused(f"the model's chat template fails on the messages: {type(error).__name__}") from None

    def encode_trusted(self, text: str) -> list[int]:
        """Return the ids of text that the template wrote, control tokens and all."""
        return list(self._trusted.encode(text, add_special_tokens=False).ids)

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of text in which nothing is a control token."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, control tokens included."""
        return str(self._trusted.decode(list(ids), skip_special_tokens=False))

    def split(self, rendered: str) -> list[int | str]:
        """Cut rendered text at its control tokens: ids for those, text for what lies between."""
        parts: list[int | str] = []
        position = 0
        for match in self._special.finditer(rendered):
            if match.start() > position:
                parts.append(rendered[position : match.start()])
            parts.append(self._ids[match[0] if match[0] in self._ids else match[0].strip()])
            position = match.end()
        if position < len(rendered):
            parts.append(rendered[position:])
        return parts

    @property
    def control_tokens(self) -> re.Pattern[str]:
        """Return a pattern that finds what the trusted encoder takes for control tokens."""
        return self._special

    def has_control_tokens(self, text: str) -> bool:
        """Tell whether the trusted encoder would see a control token in `text`."""
        return self._special.search(text) is not None

    def _strftime_now(self, format_string: str) -> str:
        return self._today.strftime(format_string)


def resolve_checkpoint(source: str, revision: str | None) -> Path:
    """Return the folder that holds the tokenizer of `source`, a folder or a name on the model hub.

    Raises ConfigurationError if it is neither, or the hub cannot be reached.
    """
    directory = Path(source)
    if directory.is_dir():
        return directory
    if directory.is_absolute():
        raise ConfigurationError(f"engine.model: {directory} does not exist; `bin/run` prepares the default model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:
        raise ConfigurationError(
            f"engine.model: {source} is no folder and could not be read from the hub: {error}"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must hold an object")  # noqa: TRY004  a fault of the file, not of the code
    return content


def _template_source(directory: Path, config: Mapping[str, Any]) -> str:
    path = directory / "chat_template.jinja"
    source = path.read_text("utf-8") if path.exists() else config.get("chat_template")
    if isinstance(source, list):
        source = next((item["template"] for item in source if item.get("name") == "default"), None)
    if not isinstance(source, str):
        raise ConfigurationError(f"the model in {directory} has no chat template; use an instruct model")
    return source


def _token_text(token: object) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _control_token_pattern(tokens: Sequence[Mapping[str, Any]]) -> re.Pattern[str]:
    """Return a pattern that finds the added tokens as the tokenizer does, with the blanks that some swallow."""
    alternatives = [
        (r"\s*" if token.get("lstrip") else "") + re.escape(token["content"]) + (r"\s*" if token.get("rstrip") else "")
        for token in sorted(tokens, key=lambda token: -len(token["content"]))
    ]
    return re.compile("|".join(alternatives) or r"(?!)")


def _compile(source: str, strftime_now: Any, directory: Path) -> jinja2.Template:
    """Compile a template in the environment that model authors write for: Hugging Face's."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals.update(raise_exception=_raise, strftime_now=strftime_now)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigurationError(f"the chat template in {directory} cannot be compiled: {error.message}") from None


def _raise(message: str) -> NoReturn:
    raise _Refusal(message)
