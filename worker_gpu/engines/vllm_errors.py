"""What it means to a request that vLLM fails, be it by an error or by ending a choice that is not complete.

Errors of a request leave without their text. vLLM quotes token ids in some of its messages, and a prompt must never reach a
log; so only the error's class is passed on, and who raises it cuts the chain of causes.
"""

from __future__ import annotations

from tasks.errors import EngineDead, EngineFailed, GatewayError, Unsupported
from worker_gpu.engines.vllm_reading import AnswerForm


def check_reason(reason: str | None, form: AnswerForm, output_tokens: int) -> None:
    """Raise what it means if vLLM ended a choice for another reason than that it is complete."""
    if reason in (None, "stop", "length"):
        return
    if reason == "error" and form.constraint is not None and output_tokens == 0:
        # So it ends a request whose grammar could not be made, before the first token.
        raise _unsupported(form)
    raise EngineFailed(f"the model engine ended it: {reason}")


def meaning(error: Exception, form: AnswerForm | None, *, stopping: bool) -> GatewayError:
    """Return what an error means to the request it ended. vLLM's own lose their text."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError

    if stopping or isinstance(error, (EngineDead, EngineDeadError)):
        return EngineDead()
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, VLLMValidationError) and form is not None and form.constraint and not form.tried:
        return _unsupported(form)
    return EngineFailed(f"the model engine failed with {type(error).__name__}")


def _unsupported(form: AnswerForm) -> Unsupported:
    """Return the refusal of a schema that vLLM turned out not to follow; its own words may quote more than that."""
    return Unsupported(f"the schema in {form.where} cannot be followed by this engine", param=form.where)
