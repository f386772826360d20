"""The same prompts for both sides: as text and agent for the gateway, as the token ids it makes of them for the engine."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from tokenizers import Tokenizer

from tasks.prompts.layout import PromptLayout
from tasks.prompts.tokenizer import ModelTokenizer

#: A token that stands for a blank and a word. Such a word is one token wherever it stands.
WORD = re.compile("Ġ([a-z]{2,9})")


@dataclass(frozen=True, slots=True)
class Ask:
    """One question: the agent and the text that the gateway is asked with, and the whole prompt as the engine gets it."""

    agent: str
    text: str
    token_ids: list[int]


class Prompts:
    """Makes agents of a given length, and questions to them that no question before has begun like."""

    def __init__(self, model: Path, profiles: Path, seed: int) -> None:
        """Take the checkpoint whose tokenizer counts, and the folder that agents are written into."""
        vocabulary = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab()
        self._words = sorted(match[1] for token in vocabulary if (match := WORD.fullmatch(token)))
        self._tokenizer = ModelTokenizer(model)
        self._profiles = profiles
        self._random = random.Random(seed)
        self._layouts: dict[str, PromptLayout] = {}

    def agent(self, name: str, tokens: int) -> str:
        """Write an agent whose profile has about so many tokens; return its name."""
        text = self._text(tokens)
        profile = {
            "agent": name,
            "version": 1,
            "description": "What the benchmark asks.",
            "segments": [{"kind": "role", "text": text}],
        }
        (self._profiles / f"{name}.yaml").write_text(yaml.safe_dump(profile, width=10**6), "utf-8")
        self._layouts[name] = PromptLayout(self._tokenizer, text)
        return name

    def asks(self, agent: str, count: int, tokens: int) -> list[Ask]:
        """Return so many new questions of about so many tokens each."""
        layout = self._layouts[agent]
        made = []
        for _ in range(count):
            text = self._text(tokens)
            joined, ids = layout.encode([{"role": "user", "content": text}])
            made.append(Ask(agent, text, [*(layout.static_token_ids if joined else ()), *ids]))
        return made

    def _text(self, tokens: int) -> str:
        return " ".join(self._random.choices(self._words, k=tokens))
