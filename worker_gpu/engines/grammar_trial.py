"""Compiles grammars in a process that may be killed for it; GrammarCheck starts it. Run as a script, with `python -P`.

It speaks in lines of JSON. The first to come is the tokenizer, as xgrammar writes it, and is answered with `null`; each
further one is a grammar to try, `{"kind", "text", "compact"}`, and is answered with the reason why it cannot be made, or
`null`. A grammar may take the seconds of processor time, over all threads, that the script is called with, and `DATA_BYTES`
of memory; one that takes more ends the process. As processor time is counted, a busy machine refuses nothing that an idle one takes; and as the
kernel counts it, this holds even after whoever asked has died.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

DATA_BYTES = 2 * 2**30
CACHE_BYTES = 64 * 2**20


def main(seconds: int) -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    # Libraries that print something must not be taken for an answer.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import xgrammar

    tokenizer = xgrammar.TokenizerInfo.deserialize_json(json.loads(sys.stdin.readline()))
    # As vLLM has it, with a smaller cache: there are schemas that only a compiler with a cache refuses.
    compiler = xgrammar.GrammarCompiler(tokenizer, max_threads=8, cache_enabled=True, cache_limit_bytes=CACHE_BYTES)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_DATA, _data_bytes() + DATA_BYTES)
    print("null", file=answers, flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)
        print(json.dumps(_refused(compiler, **json.loads(line))), file=answers, flush=True)


def _refused(compiler: Any, kind: str, text: str, compact: bool) -> str | None:
    """Compile as vLLM does; return why it cannot be done, or None if it was."""
    try:
        if kind == "json":
            separators = (",", ":") if compact else None
            compiler.compile_json_schema(text, any_whitespace=not compact, separators=separators)
        else:
            compiler.compile_structural_tag(text)
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def _limit(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _data_bytes() -> int:
    """Return the memory that this process has by now, as RLIMIT_DATA counts it."""
    status = Path("/proc/self/status").read_text("ascii", errors="replace")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
