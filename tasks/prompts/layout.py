"""Where a profile ends and a request begins, in token ids.

The chat template is rendered once with marks in place of the profile's texts (the system message, and the messages of
its examples) and a user's text. Cut at its control tokens, the result is a list of ids and stretches of text.
Everything up to the last control token before the user's mark is the static part; its ids are computed once per
profile. For a request the template is rendered with its real messages, again with the profile's marks; if it begins as
the static part does, only the rest is encoded.
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
#: The shortest conversation in which a role has something to say.
_SPEAKERS = {"system": ("system", "user"), "user": ("user",), "assistant": ("user", "assistant", "user")}


def _mark() -> str:
    """Return letters that survive any template and that no caller can guess."""
    return "qzx" + secrets.token_hex(12).translate(str.maketrans("0123456789", "ghijklmnop")) + "xzq"


class PromptLayout:
    """The token ids of one profile's prompts; with None as its text and no examples, of prompts that have no profile.

    `examples` are what a user and the assistant said, in pairs. `static_token_ids` is the part every prompt starts
    with. `joinable` tells whether joined ids equalled the whole encoding on all probes; if not, `static_token_ids` is
    empty and every prompt is encoded whole.

    Raises ConfigurationError if the template takes no such prompt at all.
    """

    def __init__(
        self, tokenizer: ModelTokenizer, static_text: str | None, examples: Sequence[tuple[str, str]] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._user = _mark()
        said = [] if static_text is None else [("system", static_text)]
        said += [pair for user, assistant in examples for pair in (("user", user), ("assistant", assistant))]
        #: The profile's texts by their marks, and the messages that hold the marks.
        self._static: dict[str, str] = {}
        self._fixed: list[Mapping[str, Any]] = []
        self._head: list[int | str] = []
        try:
            trims = {role: _trims(tokenizer, role) for role in dict.fromkeys(role for role, _ in said)}
            for role, text in said:
                self._static[mark := _mark()] = text.strip() if trims[role] else text
                self._fixed.append({"role": role, "content": mark})
            if said:
                parts = tokenizer.split(tokenizer.render(self._messages([{"role": "user", "content": self._user}])))
                self._head = parts[: _border(parts, self._user)]
            # That the whole text joins is checked once; what a task may do to the border does not depend on its length.
            first, *others = PROBES
            sample = {mark: text[-SAMPLE_CHARACTERS:] for mark, text in self._static.items()}
            self.joinable = self._joins(first, self._static) and all(self._joins(probe, sample) for probe in others)
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
        if self.joinable or hidden or self._spells_control_tokens(self._static):
            # Encoding the whole would obey control tokens. Piece by piece they stay text, where a template does not
            # join at the price of a blank here and there.
            return False, self._fill(parts, hidden)
        return False, self._tokenizer.encode_trusted(self._said(rendered))

    def _messages(self, messages: Messages) -> list[Mapping[str, Any]]:
        return [*self._fixed, *messages]

    def _joins(self, probe: str, static: Mapping[str, str]) -> bool:
        if self._spells_control_tokens(static):
            return False
        rendered = self._tokenizer.render(self._messages([{"role": "user", "content": probe}]))
        for mark, text in static.items():
            rendered = rendered.replace(mark, text)
        return self._fill(self._tokenizer.split(rendered), {}) == self._tokenizer.encode_trusted(rendered)

    def _spells_control_tokens(self, static: Mapping[str, str]) -> bool:
        return any(self._tokenizer.has_control_tokens(text) for text in static.values())

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
        for mark, said in self._static.items():
            text = text.replace(mark, said)
        return text

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


def _trims(tokenizer: ModelTokenizer, role: str) -> bool:
    """Tell whether the template strips blanks around what `role` says; then the layout must do so too."""
    padded = f"  {_mark()}  "
    messages = [{"role": each, "content": padded if each == role else "x"} for each in _SPEAKERS[role]]
    return padded not in tokenizer.render(messages)


def _border(parts: Sequence[int | str], mark: str) -> int:
    """Return the index of the first part after the last control token before the user's mark."""
    user = next((index for index, part in enumerate(parts) if isinstance(part, str) and mark in part), 0)
    controls = [index for index in range(user) if isinstance(parts[index], int)]
    return controls[-1] + 1 if controls else 0
