"""How one request's answer is limited and read: as text, as JSON of a form, or as calls of tools.

There are three forms. Without tools, the answer is text, limited by `response_format` if there is one. With tools that
the model may call or not, its own way of writing calls is read by vLLM's parser for it (vllm_tools.py), so one must be
configured. With a call that is required, or named, the model is held to a grammar: in its own words where its parser
has such a grammar, else in plain JSON (json_calls.py), which any model can be held to. Either way the arguments fit the
function's schema. Each new grammar is tried out before the engine gets it (grammar_check.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tasks.errors import Unsupported
from tasks.job import FinishReason, TokenLogprob, ToolCallDelta
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.grammar_check import GrammarCheck
from worker_gpu.engines.json_calls import json_form
from worker_gpu.engines.json_text import JsonText
from worker_gpu.engines.tool_reading import Source, ToolReader, call_ids
from worker_gpu.engines.vllm_sampling import Constraint, answer_constraint, token_logprobs
from worker_gpu.engines.vllm_tools import ToolParser

#: vLLM's name for the backend whose grammars are tried out.
XGRAMMAR = "xgrammar"


class Choice:
    """Reads one choice of an answer; without `tools`, what the model says is text. With `as_json`, text is JSON."""

    def __init__(self, tools: ToolReader | None, logprobs: int | None, *, as_json: bool) -> None:
        """Take what reads calls, and how many alternatives to report for each token; None reports no token."""
        self._tools = tools
        self._logprobs = logprobs
        self._json = JsonText() if as_json else None

    def read(
        self, completion: Any
    ) -> tuple[str, tuple[ToolCallDelta, ...], tuple[TokenLogprob, ...], FinishReason | None]:
        """Return text, parts of calls, log probabilities and finish reason of an increment of CompletionOutput."""
        text, reason = completion.text, completion.finish_reason
        calls: tuple[ToolCallDelta, ...] = ()
        if self._tools is not None:
            text, calls, reason = self._tools.read(text, completion.token_ids, reason)
        if self._json is not None:
            text = self._json.read(text)
        return text, calls, token_logprobs(completion, self._logprobs), reason


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What limits an answer, which parameter that came in, and what reads each of its choices.

    `tried` tells that the constraint is known to be one that the engine can follow.
    """

    constraint: Constraint | None
    where: str
    skip_special: bool
    choices: tuple[Choice, ...]
    tried: bool = False


class AnswerForms:
    """Decides on the form of each request's answer, for one started engine."""

    def __init__(self, config: Any, tokenizer: Any, parser: ToolParser | None) -> None:
        """Take vLLM's configuration, the model's tokenizer and its tool parser, if one is configured."""
        self._parser = parser
        self._max_logprobs: int = config.model_config.max_logprobs
        outputs = config.structured_outputs_config
        self._check: GrammarCheck | None = None
        if outputs.backend == XGRAMMAR:
            compact = outputs.disable_any_whitespace
            self._check = GrammarCheck(tokenizer, config.model_config.get_vocab_size(), compact=compact)

    async def form(self, request: GenerationRequest) -> AnswerForm:
        """Return the form of the answer. Raises Unsupported if this engine cannot give it."""
        wanted = request.sampling.logprobs
        if wanted is not None and -1 < self._max_logprobs < wanted:
            raise Unsupported(f"this engine reports {self._max_logprobs} alternatives at most", param="top_logprobs")
        if request.tools is None and request.sampling.response_format is None:
            return self._answer(request, None, None)
        # Describing many tools to vLLM's parsers takes milliseconds that other streams should not wait for.
        form = await asyncio.to_thread(self._constrained, request)
        if self._check is not None and form.constraint is not None:
            return replace(form, tried=await self._check.check(form.constraint, form.where))
        return form

    async def stop(self) -> None:
        """End what tries grammars out."""
        if self._check is not None:
            await self._check.stop()

    def _constrained(self, request: GenerationRequest) -> AnswerForm:
        answer = answer_constraint(request.sampling)
        if request.tools is None:
            return self._answer(request, answer, None)
        if self._parser is not None:
            native = self._parser.form(request.tools, answer, request.prompt_token_ids)
            if native is not None:
                return self._answer(request, native.constraint, native.source, skip_special=native.skip_special)
        elif request.tools.choice == "auto":
            raise Unsupported(
                "how this model writes calls of tools is not known here, so they can only be required",
                param="tool_choice",
                setting="engine.tool_parser",
            )
        return self._answer(request, *json_form(request.tools))

    def _answer(
        self,
        request: GenerationRequest,
        constraint: Constraint | None,
        source: Callable[[], Source] | None,
        *,
        skip_special: bool = True,
    ) -> AnswerForm:
        sampling, tools = request.sampling, request.tools
        mistral = self._parser is not None and self._parser.mistral
        readers = (
            None
            if tools is None or source is None
            else ToolReader(source(), call_ids(request, choice, mistral=mistral), single=not tools.parallel)
            for choice in range(sampling.n)
        )
        as_json = sampling.response_format is not None
        choices = tuple(Choice(reader, sampling.logprobs, as_json=as_json) for reader in readers)
        return AnswerForm(constraint, "tools" if tools else "response_format", skip_special, choices)
