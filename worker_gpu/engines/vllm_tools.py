"""Calls of tools as the served model writes them, told from text by vLLM's parser for that model.

vLLM's own server builds its answers on the same classes, so a model's peculiarities are vLLM's to know: how a call
begins and ends, whether special tokens must stay in the text, which grammar makes a model call in its own words. This
module asks those questions for one request, and gives each choice a parser of its own.

Parsers quote what they cannot parse in their messages. As that may be anything a user said, their loggers are silenced.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tasks.errors import ConfigurationError, Unsupported
from tasks.job import ToolUse
from tasks.logs import get_logger
from worker_gpu.engines.json_calls import chosen
from worker_gpu.engines.schema_limits import checked_text
from worker_gpu.engines.tool_reading import Source
from worker_gpu.engines.vllm_parsed_calls import ParsedCalls
from worker_gpu.engines.vllm_sampling import Constraint, constraint_of, structured_outputs

logger = get_logger(__name__)

LOGGERS = ("vllm.tool_parsers", "vllm.parser")
MISTRAL = "mistral"
HARMONY = "gpt_oss"
#: xgrammar's name for how much white space JSON in a structural tag may have in one place.
SPACES = "max_whitespace_cnt"


@dataclass(frozen=True, slots=True)
class NativeForm:
    """How one request's calls are written: what limits the output, and what makes a source for each choice."""

    constraint: Constraint | None
    skip_special: bool
    source: Callable[[], Source]


class ToolParser:
    """vLLM's parser of one name, for the model that `model_config` describes."""

    def __init__(self, name: str, model_config: Any) -> None:
        """Find the parser and try it with the model's tokenizer. Raises ConfigurationError if either cannot be."""
        self.name = name
        self._model_config = model_config
        try:
            from vllm.parser.parser_manager import ParserManager
            from vllm.tokenizers import cached_tokenizer_from_config
            from vllm.tool_parsers import ToolParserManager
        except Exception as error:
            raise ConfigurationError(f"this vLLM has no tool parsers that can be used here: {error}") from error
        known = ToolParserManager.list_registered()
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known)}"
            raise ConfigurationError(f"engine.tool_parser: vLLM has no {name!r}; {hint}")
        try:
            self._class: Any = ParserManager.get_parser(
                tool_parser_name=name,
                enable_auto_tools=True,
                is_harmony=getattr(model_config.hf_config, "model_type", None) == HARMONY,
            )
            self._tokenizer: Any = cached_tokenizer_from_config(model_config)
            self._parser(None)
        except Exception as error:
            raise ConfigurationError(f"engine.tool_parser {name!r} cannot read this model: {error}") from error
        for module in LOGGERS:
            logging.getLogger(module).setLevel(logging.CRITICAL)

    @property
    def mistral(self) -> bool:
        """Tell whether ids of calls must be as Mistral's templates want them."""
        return self.name == MISTRAL

    def form(self, tools: ToolUse, answer: Constraint | None, prompt_token_ids: list[int]) -> NativeForm | None:
        """Return how these tools are called. None if vLLM cannot force this choice in the model's own words.

        `answer` is what text must look like. Raises Unsupported if the parser cannot take these tools, or if the
        schema of a `strict` function could not be followed.
        """
        if forced := tools.choice != "auto":
            answer = None  # There will be no text.
        for tool in tools.tools:
            if tool["function"].get("strict"):
                checked_text(tool["function"].get("parameters") or {}, "tools")
        try:
            request = self._request(tools, answer)
            parser = self._parser(request.tools)
            if answer is not None and hasattr(parser, "tool_strict_level"):
                # Without a form for calls, vLLM would leave none possible beside the form of the text.
                from vllm.tool_parsers.tool_strict_level import ToolStrictLevel

                parser.tool_strict_level = ToolStrictLevel.FUNCTION
            request = parser.adjust_request(request)
            constraint = _with_little_space(constraint_of(request.structured_outputs))
        except Unsupported:
            raise
        except Exception as error:
            # Its text may quote the tools.
            logger.warning("the tool parser refuses a request's tools", parser=self.name, error=type(error).__name__)
            raise Unsupported(
                f"this model's tool parser, {self.name}, cannot take these tools", param="tools"
            ) from None
        if forced and (constraint is None or constraint.kind == "json"):
            return None
        return NativeForm(
            constraint,
            bool(request.skip_special_tokens),
            lambda: ParsedCalls(self._parser(request.tools), request, prompt_token_ids),
        )

    def _request(self, tools: ToolUse, answer: Constraint | None) -> Any:
        """Return the request as vLLM's server would have it; of the conversation it has nothing."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        # Parsers change what they are given, and this is the job's.
        described = copy.deepcopy(list(tools.tools))
        choice: Any = tools.choice
        if choice != "auto":
            for tool in described:
                # A forced call is one the client relies on: its arguments are to fit the schema.
                tool["function"]["strict"] = True
        if choice not in ("auto", "required"):
            choice = {"type": "function", "function": {"name": chosen(tools)["name"]}}
        return ChatCompletionRequest(
            messages=[],
            tools=described,
            tool_choice=choice,
            parallel_tool_calls=tools.parallel,
            structured_outputs=structured_outputs(answer),
        )

    def _parser(self, tools: Any) -> Any:
        return self._class(self._tokenizer, tools, model_config=self._model_config)


def _with_little_space(constraint: Constraint | None) -> Constraint | None:
    """Return a structural tag in which JSON has no two spaces side by side: a weak model can fill answers with them."""
    if constraint is None or constraint.kind != "structural_tag":
        return constraint
    tag = json.loads(constraint.text)
    waiting = [tag]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            if SPACES in node:  # Older versions of xgrammar do not have it.
                node[SPACES] = 1
            waiting += [value for key, value in node.items() if key != "json_schema"]
    return Constraint("structural_tag", json.dumps(tag))
