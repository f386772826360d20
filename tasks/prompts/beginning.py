"""What a profile's prompts begin with, as its model's chat template writes it.

The template is rendered with marks in place of the profile's texts (the system message, and the messages of its
examples) and of what a user says. Cut at its control tokens, the result is a list of ids and stretches of text; up to
the last control token before the user's mark, it is the same for every prompt. Each stretch is encoded as plain text,
with the texts in place of their marks.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tasks.prompts.tokenizer import ModelTokenizer

Messages = Sequence[Mapping[str, Any]]
Parts = Sequence[int | str]
#: The shortest conversation in which a role has something to say.
_SPEAKERS = {"system": ("system", "user"), "user": ("user",), "assistant": ("user", "assistant", "user")}


def new_mark() -> str:
    """Return letters that survive any template and that no caller can guess."""
    return "qzx" + secrets.token_hex(12).translate(str.maketrans("0123456789", "ghijklmnop")) + "xzq"


class Beginning:
    """The part of a rendered prompt that a profile's texts are in; without any texts it is empty.

    `examples` are what a user and the assistant said, in pairs. `messages` hold a mark each, and `texts` what it stands
    for. `parts` are the ids and stretches of text. Raises TemplateRefused if the template does not take the messages.
    """

    def __init__(
        self, tokenizer: ModelTokenizer, static_text: str | None, examples: Iterable[tuple[str, str]] = ()
    ) -> None:
        self._tokenizer = tokenizer
        said = [] if static_text is None else [("system", static_text)]
        said += [pair for user, assistant in examples for pair in (("user", user), ("assistant", assistant))]
        trims = {role: _trims(tokenizer, role) for role in dict.fromkeys(role for role, _ in said)}
        self.texts: dict[str, str] = {}
        self.messages: list[Mapping[str, Any]] = []
        self.parts: list[int | str] = []
        for role, text in said:
            self.texts[mark := new_mark()] = text.strip() if trims[role] else text
            self.messages.append({"role": role, "content": mark})
        if said:
            user = new_mark()
            parts = tokenizer.split(tokenizer.render([*self.messages, {"role": "user", "content": user}]))
            self.parts = parts[: _border(parts, user)]

    @property
    def token_ids(self) -> list[int]:
        """Return the ids of the beginning."""
        return self.fill(self.parts)

    @property
    def spells_control_tokens(self) -> bool:
        """Tell whether one of the texts spells a control token."""
        return any(self._tokenizer.has_control_tokens(text) for text in self.texts.values())

    def fill(self, parts: Parts, hidden: Mapping[str, str] | None = None) -> list[int]:
        """Return the ids of `parts`, the beginning's own or another rendering's; `hidden` are marks of the caller's."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                text = part
                for mark, spelling in (hidden or {}).items():
                    text = text.replace(mark, spelling)
                ids.extend(self._tokenizer.encode_plain(self.said(text)))
        return ids

    def said(self, rendered: str) -> str:
        """Return rendered text with the profile's texts in place of their marks."""
        for mark, text in self.texts.items():
            rendered = rendered.replace(mark, text)
        return rendered


def _trims(tokenizer: ModelTokenizer, role: str) -> bool:
    """Tell whether the template strips blanks around what `role` says; then they must be left out of the text too."""
    padded = f"  {new_mark()}  "
    messages = [{"role": each, "content": padded if each == role else "x"} for each in _SPEAKERS[role]]
    return padded not in tokenizer.render(messages)


def _border(parts: Parts, mark: str) -> int:
    """Return the index of the first part after the last control token before the user's mark."""
    user = next((index for index, part in enumerate(parts) if isinstance(part, str) and mark in part), 0)
    controls = [index for index in range(user) if isinstance(parts[index], int)]
    return controls[-1] + 1 if controls else 0
