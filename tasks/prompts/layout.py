"""Where a profile ends and a request begins, in token ids.

The chat template is rendered once with marks in place of the profile's texts and a user's, and cut at its control tokens
(`tasks.prompts.beginning`). What comes before the user is the static part; its ids are computed once per profile. For a
request the template is rendered with its real messages, again with the profile's marks; if it begins as the static part
does, only the rest is encoded.
Each stretch between control tokens is encoded as plain text, so no text can become a control token, and no token can span
two parts.

Text that spells a control token must not be taken for one when the rendered prompt is cut. So before rendering, each
such spelling in the caller's messages is replaced by letters that nobody can guess, and put back before encoding;
text without control tokens meets the template as it is.

That encoding piece by piece must give what encoding the whole prompt would give. It does for most templates, and is
not taken on trust: `PromptLayout` compares both on probes, and where they differ it encodes the whole prompt instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.errors import ConfigurationError
from tasks.prompts.beginning import Beginning, Messages, new_mark
from tasks.prompts.sharing import Said, segment_ends
from tasks.prompts.tokenizer import ModelTokenizer, TemplateRefused

#: Text that is known to upset naive joins: blanks at either end, merges over the border, scripts, template syntax.
PROBES = (
    "What is the status?",
    "\n\nLeading blank lines",
    "Trailing spaces and lines  \n\n",
    " one leading space",
    "\tTab",
    "'s 1234 ...",
    "```\ncode\n```",
    "{{ context }} {% if x %} %s {0}",
    "user\nassistant\nsystem",
    "Ünïcödé 漢字 🙂",
    "x",
)
SAMPLE_CHARACTERS = 1000


class PromptLayout:
    """The token ids of one profile's prompts; with None as its text and no examples, of prompts that have no profile.

    `examples` are what a user and the assistant said, in pairs. `static_token_ids` is the part every prompt starts
    with. `joinable` tells whether joined ids equalled the whole encoding on all probes; if not, `static_token_ids` is
    empty and every prompt is encoded whole. `inner` is what the profile says up to the end of each segment but the last,
    and `ends` how many of the static ids that is (`tasks.prompts.sharing`).

    Raises ConfigurationError if the template takes no such prompt at all.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        static_text: str | None,
        examples: Sequence[tuple[str, str]] = (),
        inner: Sequence[Said] = (),
    ) -> None:
        self._tokenizer = tokenizer
        try:
            self._static = static = Beginning(tokenizer, static_text, examples)
            # That the whole text joins is checked once; what a task may do to the border does not depend on its length.
            first, *others = PROBES
            sample = {mark: text[-SAMPLE_CHARACTERS:] for mark, text in static.texts.items()}
            self.joinable = self._joins(first, static.texts) and all(self._joins(probe, sample) for probe in others)
            self._head = static.parts if self.joinable else []
            self.static_token_ids = tuple(static.fill(self._head))
            self.ends = segment_ends(tokenizer, inner, self.static_token_ids) if self.joinable else (0,) * len(inner)
        except TemplateRefused as error:
            raise ConfigurationError(error.detail) from None

    @property
    def supports_tools(self) -> bool:
        """Tell whether the model's template shows tools to the model."""
        return self._tokenizer.supports_tools

    def encode(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None) -> tuple[bool, list[int]]:
        """Return whether the prompt begins with `static_token_ids`, and the ids: what follows them, or all.

        `messages` go after the profile's text; their content is data. Raises TemplateRefused if the template does.
        """
        hidden: dict[str, str] = {}
        rendered = self._tokenizer.render(self._messages(self._hide(messages, hidden)), self._hide(tools, hidden))
        parts = self._tokenizer.split(rendered)
        head = len(self._head)
        # A template may put the caller's tools before the border; such a prompt has a beginning of its own.
        if head and parts[:head] == self._head:
            return True, self._static.fill(parts[head:], hidden)
        if self.joinable or hidden or self._static.spells_control_tokens:
            # Encoding the whole would obey control tokens. Piece by piece they stay text, where a template does not
            # join at the price of a blank here and there.
            return False, self._static.fill(parts, hidden)
        return False, self._tokenizer.encode_trusted(self._static.said(rendered))

    def _messages(self, messages: Messages) -> list[Mapping[str, Any]]:
        return [*self._static.messages, *messages]

    def _joins(self, probe: str, texts: Mapping[str, str]) -> bool:
        if self._static.spells_control_tokens:
            return False
        rendered = self._tokenizer.render(self._messages([{"role": "user", "content": probe}]))
        for mark, text in texts.items():
            rendered = rendered.replace(mark, text)
        return self._static.fill(self._tokenizer.split(rendered)) == self._tokenizer.encode_trusted(rendered)

    def _hide(self, value: Any, hidden: dict[str, str]) -> Any:
        """Return `value` with a mark in place of each control token it spells; `hidden` gets what each stands for."""
        if isinstance(value, str):
            return self._tokenizer.control_tokens.sub(lambda match: _hidden_as(match[0], hidden), value)
        if isinstance(value, Mapping):
            return {self._hide(key, hidden): self._hide(item, hidden) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self._hide(item, hidden) for item in value]
        return value


def _hidden_as(spelling: str, hidden: dict[str, str]) -> str:
    mark = next((mark for mark, known in hidden.items() if known == spelling), None)
    if mark is None:
        hidden[mark := new_mark()] = spelling
    return mark
