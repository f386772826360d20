"""Between our words and vLLM's: how tokens are chosen, what limits them, and how likely they were."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks.job import Sampling, TokenLogprob
from worker_gpu.engines.schema_limits import checked_text

#: Log probabilities reach minus infinity, which JSON cannot say. OpenAI's API shows this number for it.
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the output must look like: `kind` is a field of vLLM's StructuredOutputsParams, `text` its value."""

    kind: Literal["json", "json_object", "structural_tag", "grammar", "regex"]
    text: str = ""


def answer_constraint(sampling: Sampling) -> Constraint | None:
    """Return what `response_format` asks for. Raises Unsupported for a schema that could not be followed exactly."""
    wanted = sampling.response_format
    if wanted is None:
        return None
    if wanted.type == "json_object":
        return Constraint("json_object")
    return Constraint("json", checked_text(wanted.json_schema or {}, "response_format"))


def sampling_params(sampling: Sampling, constraint: Constraint | None = None, *, skip_special: bool = True) -> Any:
    """Return vLLM's SamplingParams; text comes in increments. With `skip_special`, special tokens are no text."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    # vLLM refuses several greedy answers to one prompt. To choose from the likeliest token alone is the same.
    greedy_choices = sampling.n > 1 and sampling.temperature == 0
    return SamplingParams(
        n=sampling.n,
        max_tokens=sampling.max_tokens,
        temperature=1.0 if greedy_choices else sampling.temperature,
        top_p=sampling.top_p,
        top_k=1 if greedy_choices else sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        stop=list(sampling.stop),
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        skip_special_tokens=skip_special,
        structured_outputs=structured_outputs(constraint),
        output_kind=RequestOutputKind.DELTA,
    )


def structured_outputs(constraint: Constraint | None) -> Any:
    """Return vLLM's StructuredOutputsParams of a constraint."""
    from vllm.sampling_params import StructuredOutputsParams

    if constraint is None:
        return None
    return StructuredOutputsParams(**{constraint.kind: True if constraint.kind == "json_object" else constraint.text})


def constraint_of(params: Any) -> Constraint | None:
    """Return the constraint that vLLM's StructuredOutputsParams hold."""
    if params is None:
        return None
    if params.json is not None:
        return Constraint("json", params.json if isinstance(params.json, str) else json.dumps(params.json))
    if params.json_object:
        return Constraint("json_object")
    for kind in ("structural_tag", "grammar", "regex"):
        if (text := getattr(params, kind)) is not None:
            return Constraint(kind, text)
    return None


def token_logprobs(completion: Any, alternatives: int | None) -> tuple[TokenLogprob, ...]:
    """Return the log probabilities of one increment of vLLM's CompletionOutput; none if `alternatives` is None.

    The token that ends an answer is left out, as in OpenAI's API: it is no part of the answer.
    """
    if alternatives is None or not completion.logprobs:
        return ()
    token_ids = list(completion.token_ids)
    if completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str):
        token_ids = token_ids[:-1]
    # vLLM repeats earlier entries where there is no new token, so the tokens say how many there are.
    entries = zip(token_ids, completion.logprobs, strict=False)
    return tuple(_token(entry, token_id, alternatives) for token_id, entry in entries)


def _token(entry: Mapping[int, Any], token_id: int, alternatives: int) -> TokenLogprob:
    # The chosen token is among the entries whether or not it is likely; its rank tells.
    ranked: Sequence[Any] = sorted((one for one in entry.values() if one.rank), key=lambda one: int(one.rank))
    return TokenLogprob(
        token=entry[token_id].decoded_token or "",
        logprob=_finite(entry[token_id].logprob),
        top=tuple((one.decoded_token or "", _finite(one.logprob)) for one in ranked if one.rank <= alternatives),
    )


def _finite(logprob: float) -> float:
    return max(float(logprob), LEAST_LOGPROB)
