"""The tokens that a batch's requests took together, in the form of OpenAI's batch object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Usage:
    """A sum over response bodies of `/v1/chat/completions` and `/v1/responses`."""

    def __init__(self) -> None:
        self._input = self._cached = self._output = self._reasoning = 0

    def add(self, body: Mapping[str, Any]) -> None:
        """Add what one response body says under `usage`."""
        usage = body.get("usage") or {}
        self._input += usage.get("input_tokens", usage.get("prompt_tokens", 0))
        self._output += usage.get("output_tokens", usage.get("completion_tokens", 0))
        details = usage.get("input_tokens_details", usage.get("prompt_tokens_details")) or {}
        self._cached += details.get("cached_tokens") or 0
        details = usage.get("output_tokens_details", usage.get("completion_tokens_details")) or {}
        self._reasoning += details.get("reasoning_tokens") or 0

    def as_dict(self) -> dict[str, Any]:
        """Return the batch's usage object."""
        return {
            "input_tokens": self._input,
            "input_tokens_details": {"cached_tokens": self._cached},
            "output_tokens": self._output,
            "output_tokens_details": {"reasoning_tokens": self._reasoning},
            "total_tokens": self._input + self._output,
        }
