"""Asks several systems the same at the same moments, each over connections of its own.

A machine's second is `1 / scale` seconds of what is simulated. The systems run at the same time, so that whatever else the
machine does slows all of them alike; none gets so much to do that it could matter (see `http_load`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.overheadlab.connection import Connections
from bench.overheadlab.system import PATH, System
from bench.overheadlab.wire import Said, WrongAnswer, post, read
from bench.schedulinglab.http_work import Texts, agent, answer_tokens
from bench.schedulinglab.workload import Ask

#: After so many simulated seconds a client gives up. A router that is overloaded would otherwise be waited for very long.
ANSWER_S = 20.0
SETTLED_S = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """A system, and how it is told the profile: by the agent's name, or else as the system prompt.

    `static_tokens` are those that all prompts of a profile begin with.
    """

    system: System
    by_agent: bool
    static_tokens: int

    def request(self, ask: Ask, texts: Texts) -> bytes:
        """Return the request that asks it."""
        if self.by_agent:
            asked = replace(self.system, model=agent(ask.profile))
        else:
            asked = replace(self.system, system_prompt=texts.profile(ask.profile))
        body = asked.body(texts.question(ask), stream=True, tokens=answer_tokens(ask))
        return post(f"127.0.0.1:{asked.port}", PATH, asked.headers, {**body, "stream_options": {"include_usage": True}})


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a request; times are in simulated seconds. It was sent `late_s` after its time.

    Without `said` there is no right answer, and `error` says what there is instead.
    """

    ask: Ask
    late_s: float
    first_s: float = 0.0
    whole_s: float = 0.0
    said: Said | None = None
    error: str = ""


async def play(
    asks: Sequence[Ask], targets: Sequence[Target], texts: Texts, scale: float
) -> Mapping[str, list[Served]]:
    """Ask every target everything; return what each made of it, by its name."""
    pools = {target.system.name: Connections(target.system.port) for target in targets}
    began = time.perf_counter() + SETTLED_S
    tasks: dict[str, list[asyncio.Task[Served]]] = {name: [] for name in pools}
    for ask in asks:
        due = began + ask.at * scale
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        for target in targets:
            name = target.system.name
            tasks[name].append(asyncio.create_task(_asked(ask, target, pools[name], texts, due, scale)))
    found = {name: list(await asyncio.gather(*made)) for name, made in tasks.items()}
    for pool in pools.values():
        await pool.close()
    return found


async def _asked(ask: Ask, target: Target, pool: Connections, texts: Texts, due: float, scale: float) -> Served:
    request = target.request(ask, texts)
    sent_at = time.perf_counter()
    late_s = (sent_at - due) / scale
    connection = None
    try:
        async with asyncio.timeout(ANSWER_S * scale):
            connection = await pool.take()
            done_at = await connection.ask(request)
        said = read(bytes(connection.reply.data), stream=True)
        if len(said.text.split()) != answer_tokens(ask):
            raise WrongAnswer(f"{said.chunks} chunks and not {answer_tokens(ask)} words")
    except (OSError, TimeoutError, WrongAnswer) as error:
        if connection is not None:
            connection.transport.abort()
        return Served(ask, late_s, error=f"{type(error).__name__}: {error}")
    pool.give_back(connection)
    return Served(ask, late_s, (connection.first_at - due) / scale, (done_at - due) / scale, said)
