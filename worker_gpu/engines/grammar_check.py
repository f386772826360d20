"""Tries a schema out before the engine gets it.

A schema becomes a grammar, and how long that takes cannot be told from looking: of 60 characters, some take minutes
and gigabytes. EngineCore compiles in a few threads that nothing can stop, so one such schema would keep every later
one waiting, and a refusal there reaches us as a failure without a reason. Therefore each new schema is first compiled
in a process of its own (grammar_trial.py), which is killed when it takes too long or too much memory. What was found
is remembered by the schema's hash, so that an agent's usual schemas cost nothing. The process starts with the first
schema, which then waits for some seconds of imports, and lives as long as the engine.

Messages of xgrammar speak of the schema alone; nothing here knows the prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

from tasks.errors import EngineFailed, Unsupported
from tasks.logs import get_logger
from worker_gpu.engines.vllm_sampling import Constraint, structured_outputs

logger = get_logger(__name__)

SCRIPT = Path(__file__).with_name("grammar_trial.py")
#: Processor time that one grammar may take. Ten strings of different `maxLength` take 15 s with 49,000 tokens, and
#: proportionally more with more.
CPU_S = 60
WAIT_S = 150.0  # On a machine with much else to do, after which the client has gone.
REMEMBERED = 1024
MAX_REASON = 200
#: xgrammar begins with the time and the line of its source.
PREFIX = re.compile(r"^(?:\[[\d:]+\] )?(?:\S+\.(?:cc|h):\d+: )?(?:Check failed: \([^)]*\) is false: )?")
TOO_COMPLEX = "it is too complex: its grammar took too long or too much memory to make"


class GrammarCheck:
    """Tries constraints out for one engine. With `compact`, its JSON has no free whitespace."""

    def __init__(self, tokenizer: Any, vocabulary: int, *, compact: bool, cpu_s: int = CPU_S) -> None:
        """Take the model's tokenizer and the number of its logits; nothing is started yet."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._compact = compact
        self._cpu_s = cpu_s
        self._found: OrderedDict[bytes, str | None] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._usable = True

    async def check(self, constraint: Constraint, where: str) -> bool:
        """Raise Unsupported if the engine could not follow this; `where` is the parameter it came in.

        Returns whether it was tried: not all kinds are, nor all tokenizers. Raises EngineFailed if that fails.
        """
        if not self._usable or constraint.kind not in ("json", "structural_tag"):
            return False
        key = hashlib.sha256(f"{constraint.kind}:{constraint.text}".encode()).digest()
        if key not in self._found:
            async with self._one_at_a_time:
                if key not in self._found:
                    self._remember(key, await self._try(constraint, where))
        self._found.move_to_end(key)
        if (reason := self._found[key]) is not None:
            raise Unsupported(f"the schema in {where} cannot be followed: {reason}", param=where)
        return self._usable

    async def stop(self) -> None:
        """End the process; what is being tried is given up."""
        if (process := self._process) is not None:
            self._process = None
            # One that ends by itself is not killed: looking whether it is there still would take its status from asyncio.
            if process.returncode is None and not (process.stdout and process.stdout.at_eof()):
                process.kill()
            await process.wait()

    def _remember(self, key: bytes, reason: str | None) -> None:
        self._found[key] = reason
        if len(self._found) > REMEMBERED:
            self._found.popitem(last=False)

    async def _try(self, constraint: Constraint, where: str) -> str | None:
        """Return why this is refused, or None. What only this machine's other work made late is not remembered."""
        if self._process is None or self._process.returncode is not None:
            await self._start()
        if not self._usable:
            return None
        question = {"kind": constraint.kind, "text": constraint.text, "compact": self._compact}
        try:
            answer = await self._ask(json.dumps(question))
        except TimeoutError:
            raise Unsupported(f"the schema in {where} cannot be followed: {TOO_COMPLEX}", param=where) from None
        if answer is None:
            return TOO_COMPLEX
        if (reason := json.loads(answer)) is None:
            reason = await asyncio.to_thread(_refused_by_vllm, constraint)
        if reason is None:
            return None
        return next(iter(PREFIX.sub("", reason).strip().splitlines()), "it contradicts itself")[:MAX_REASON]

    async def _start(self) -> None:
        await self.stop()
        try:
            tokenizer = await asyncio.to_thread(_described, self._tokenizer, self._vocabulary)
        except Exception as error:
            # A kind of tokenizer for which vLLM has its own way, such as Mistral's; only it sees schemas then.
            logger.warning("schemas are not tried out: xgrammar cannot read the tokenizer", error=type(error).__name__)
            self._usable = False
            return
        # -P: beside the script lies a module that is called vllm as well.
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", str(SCRIPT), str(self._cpu_s)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            started = await self._ask(json.dumps(tokenizer)) is not None
        except TimeoutError:
            started = False
        if not started:
            logger.error("schemas cannot be tried out: their process does not start", script=SCRIPT.name)
            raise EngineFailed("the schema cannot be looked at")

    async def _ask(self, line: str) -> bytes | None:
        """Return what the process answers, or None if it ended. Raises TimeoutError; it is then ended."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return None
        answer = b""
        try:
            async with asyncio.timeout(WAIT_S):
                process.stdin.write(line.encode() + b"\n")
                await process.stdin.drain()
                answer = await process.stdout.readline()
        except OSError:
            pass
        finally:
            # Without an answer there is nobody there, or one who would answer the next question with it.
            if not answer:
                await self.stop()
        return answer or None


def _described(tokenizer: Any, vocabulary: int) -> str:
    """Return what xgrammar needs to know of a tokenizer, in its own words."""
    import xgrammar

    return str(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary).serialize_json())


def _refused_by_vllm(constraint: Constraint) -> str | None:
    """Return why vLLM would not pass this to xgrammar, or None."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    try:
        validate_xgrammar_grammar(SamplingParams(structured_outputs=structured_outputs(constraint)))
    except Exception as error:
        return str(error) or type(error).__name__
    return None
