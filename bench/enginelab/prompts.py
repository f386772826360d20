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
        self._words = one_token_words(model)
        self._tokenizer = ModelTokenizer(model)
        self._profiles = profiles
        self._random = random.Random(seed)
        self._layouts: dict[str, PromptLayout] = {}

    def agent(self, name: str, tokens: int) -> str:
        """Write an agent whose profile has about so many tokens; return its name."""
        text = self._text(tokens)
        write_agent(self._profiles, name, text)
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

    def static_tokens(self, agent: str) -> int:
        """Return how many tokens all prompts of an agent begin with."""
        return len(self._layouts[agent].static_token_ids)

    def _text(self, tokens: int) -> str:
        return " ".join(self._random.choices(self._words, k=tokens))


def one_token_words(model: Path) -> list[str]:
    """Return the words of a checkpoint's vocabulary that are one token wherever they stand after a blank."""
    vocabulary = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab()
    return sorted(match[1] for token in vocabulary if (match := WORD.fullmatch(token)))


def write_agent(profiles: Path, name: str, text: str) -> None:
    """Write an agent whose profile is this text into a folder of profiles."""
    profile = {
        "agent": name,
        "version": 1,
        "description": "What the benchmark asks.",
        "segments": [{"kind": "role", "text": text}],
    }
    (profiles / f"{name}.yaml").write_text(yaml.safe_dump(profile, width=10**6), "utf-8")
