"""Where a profile ends and a request begins, in token ids.

The chat template is rendered once with marks in place of the system text and a user's text. Cut at its control
tokens, the result is a list of ids and stretches of text. Everything up to the last control token before the user's
mark is the static part; its ids are computed once per profile. For a request the template is rendered with its real
messages, again with the mark for the system text; if it begins as the static part does, only the rest is encoded.
Each stretch is encoded as plain text, so no text can become a control token, and no token can span two parts.

Text that spells a control token must not be taken for one when the rendered prompt is cut. So before rendering, each
such spelling in the caller's messages is replaced by letters that nobody can guess, and put back before encoding;
text without control tokens meets the template as it is.

That encoding piece by piece must give what encoding the whole prompt would give. It does for most templates, and is
not taken on trust: `PromptLayout` compares both on probes, and where they differ it encodes the whole prompt instead.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.errors import ConfigurationError
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
Messages = Sequence[Mapping[str, Any]]


def _mark() -> str:
    """Return letters that survive any template and that no caller can guess."""
    return "qzx" + secrets.token_hex(12).translate(str.maketrans("0123456789", "ghijklmnop")) + "xzq"


class PromptLayout:
    """The token ids of one profile's prompts; with None as its text, of prompts that have no profile.

    `static_token_ids` is the part every prompt starts with. `joinable` tells whether joined ids equalled the whole
    encoding on all probes; if not, `static_token_ids` is empty and every prompt is encoded whole.

    Raises ConfigurationError if the template takes no such prompt at all.
    """

    def __init__(self, tokenizer: ModelTokenizer, static_text: str | None) -> None:
        self._tokenizer = tokenizer
        self._system, self._user = _mark(), _mark()
        self._static_text = static_text
        self._head: list[int | str] = []
        try:
            if static_text is not None:
                self._static_text = static_text.strip() if _trims(tokenizer, self._system) else static_text
                parts = tokenizer.split(tokenizer.render(self._messages([{"role": "user", "content": self._user}])))
                self._head = parts[: _border(parts, self._user)]
            # That the whole text joins is checked once; what a task may do to the border does not depend on its length.
            first, *others = PROBES
            sample = (self._static_text or "")[-SAMPLE_CHARACTERS:]
            self.joinable = self._joins(first, self._static_text or "") and all(
                self._joins(probe, sample) for probe in others
            )
        except TemplateRefused as error:
            raise ConfigurationError(error.detail) from None
        self.static_token_ids = tuple(self._fill(self._head, {}))
        if not self.joinable:
            self._head, self.static_token_ids = [], ()

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
            return True, self._fill(parts[head:], hidden)
        if self.joinable or hidden or self._tokenizer.has_control_tokens(self._static_text or ""):
            # Encoding the whole would obey control tokens. Piece by piece they stay text, where a template does not
            # join at the price of a blank here and there.
            return False, self._fill(parts, hidden)
        return False, self._tokenizer.encode_trusted(self._said(rendered))

    def _messages(self, messages: Messages) -> list[Mapping[str, Any]]:
        return [*([] if self._static_text is None else [{"role": "system", "content": self._system}]), *messages]

    def _joins(self, probe: str, static_text: str) -> bool:
        rendered = self._tokenizer.render(self._messages([{"role": "user", "content": probe}]))
        rendered = rendered.replace(self._system, static_text)
        if self._tokenizer.has_control_tokens(static_text):
            return False
        return self._fill(self._tokenizer.split(rendered), {}) == self._tokenizer.encode_trusted(rendered)

    def _fill(self, parts: Sequence[int | str], hidden: Mapping[str, str]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                text = part
                for mark, spelling in hidden.items():
                    text = text.replace(mark, spelling)
                ids.extend(self._tokenizer.encode_plain(self._said(text)))
        return ids

    def _said(self, text: str) -> str:
        return text if self._static_text is None else text.replace(self._system, self._static_text)

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
        hidden[mark := _mark()] = spelling
    return mark


def _trims(tokenizer: ModelTokenizer, mark: str) -> bool:
    """Tell whether the template strips blanks around a system text; then the layout must do so too."""
    messages = [{"role": "system", "content": f"  {mark}  "}, {"role": "user", "content": "x"}]
    return f"  {mark}  " not in tokenizer.render(messages)


def _border(parts: Sequence[int | str], mark: str) -> int:
    """Return the index of the first part after the last control token before the user's mark."""
    user = next((index for index, part in enumerate(parts) if isinstance(part, str) and mark in part), 0)
    controls = [index for index in range(user) if isinstance(parts[index], int)]
    return controls[-1] + 1 if controls else 0
