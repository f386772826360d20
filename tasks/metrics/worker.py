"""What a GPU worker tells: tokens and their times, the engine, and its hold on what it runs."""

from __future__ import annotations

from itertools import product
from typing import Final, get_args

from tasks.job import Priority
from tasks.metrics.making import WORKER, Reading, counter, gauge, histogram

_WAITING_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_WHOLE_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)

QUEUE_WAIT = histogram(
    WORKER,
    "metaqore_queue_wait_seconds",
    "From when a request was published until this attempt's worker took it, of those whose answer began.",
    _WAITING_S,
    ("priority",),
)
FIRST_TOKEN = histogram(
    WORKER,
    "metaqore_first_token_seconds",
    "From when a request was published until this attempt's first token; `hit`: part of the prompt was in the KV cache.",
    _WAITING_S,
    ("priority", "cache"),
)
PREFILL = histogram(
    WORKER,
    "metaqore_prefill_seconds",
    "From when the engine began with a prompt until the first token, as the engine tells it.",
    _WAITING_S,
    ("cache",),
)
INTER_TOKEN = histogram(
    WORKER,
    "metaqore_inter_token_seconds",
    "Time between tokens of one request: of each frame that is sent, the mean over its tokens.",
    _TOKEN_S,
)
ANSWERED = histogram(
    WORKER,
    "metaqore_request_seconds",
    "From when a request was published until its end was about to be recorded, by how it ended.",
    _WHOLE_S,
    ("state",),
)
PROMPT_TOKENS = counter(
    WORKER,
    "metaqore_prompt_tokens_total",
    "Prompt tokens of requests whose answer began: `computed` by prefill, or `cached` in the KV cache.",
    ("source",),
)
PREFIX_TOKENS = counter(
    WORKER,
    "metaqore_prefix_tokens_total",
    "Tokens of profiles, of requests whose answer began: `expected` in the KV cache by the queue's decision, and `found` there.",
    ("cache",),
)
PREDICTIONS = counter(
    WORKER,
    "metaqore_cache_predictions_total",
    "Requests whose answer began, by what the KV cache had of their profile: `as_expected`, or `less` or `more` by a block.",
    ("found",),
)
WARMED = counter(
    WORKER,
    "metaqore_profiles_warmed_total",
    "Profiles computed because that was wished for: `warmed`; `not_kept` by the KV cache; or `failed`.",
    ("outcome",),
)
WARM = gauge(
    WORKER, "metaqore_warm_profiles", "Profiles that were computed because that was wished for, and are held still."
)
REFRESHED = counter(
    WORKER,
    "metaqore_profiles_refreshed_total",
    "Times that a profile was used by the worker itself, so that the KV cache did not let it go.",
)
OUTPUT_TOKENS = counter(WORKER, "metaqore_output_tokens_total", "Tokens that the engine has decoded.")
ENGINE_SEQUENCES = Reading(
    WORKER,
    "metaqore_engine_sequences",
    "Sequences in the engine's last step, and those it had no room for.",
    ("state",),
)
ENGINE_LIMIT = Reading(
    WORKER, "metaqore_engine_sequences_limit", "Requests the worker runs at once (`engine.max_num_seqs`)."
)
ENGINE_KV = Reading(
    WORKER, "metaqore_engine_kv_usage_ratio", "Share of the KV cache that running sequences hold, 0 to 1."
)
KV_BLOCKS = Reading(
    WORKER, "metaqore_kv_cache_blocks_size", "Blocks of the KV cache that a prompt could find again.", ("tier",)
)
KV_LOSSES = Reading(
    WORKER,
    "metaqore_kv_event_losses_total",
    "Times that events of the KV cache were lost for good, and what it holds had to be learned anew.",
    counts=True,
)
ENGINE_STEPS = Reading(WORKER, "metaqore_engine_steps_total", "Steps that the engine has computed.", counts=True)
ENGINE_PREEMPTIONS = Reading(
    WORKER,
    "metaqore_engine_preemptions_total",
    "Sequences that lost their KV blocks to others and are computed again.",
    counts=True,
)
WORKER_STATE = Reading(WORKER, "metaqore_worker_state", "1 for the state that this worker is in, else 0.", ("state",))
IN_HAND = Reading(WORKER, "metaqore_worker_requests", "Requests that this worker has taken and not yet let go.")
LEASES_HELD = Reading(WORKER, "metaqore_leases_held", "Messages that this worker holds under a lease.")
LEASES_CONFIRMED = Reading(
    WORKER,
    "metaqore_lease_renewal_age_seconds",
    "Since when Redis has confirmed no renewal of this worker's leases; they end after `scheduling.lease_s`.",
)
LEASES_RENEWED = counter(
    WORKER, "metaqore_lease_renewals_total", "Leases that Redis has renewed, one a message each time."
)
LEASES_LOST = counter(
    WORKER, "metaqore_leases_lost_total", "Leases that another process had taken over when they were renewed."
)
LEASES_ADOPTED = counter(
    WORKER, "metaqore_leases_adopted_total", "Leased messages that Redis had lost, and was told of again."
)
FENCED = counter(WORKER, "metaqore_attempts_fenced_total", "Attempts that ended when another had taken over.")
REFUSED = counter(
    WORKER, "metaqore_messages_refused_total", "Messages set aside, since no gateway wrote them as they are."
)
FRAMES = counter(WORKER, "metaqore_stream_frames_total", "Frames that Redis has taken of this worker.")
SEND_FAILURES = counter(
    WORKER, "metaqore_stream_send_failures_total", "Tries to send frames that Redis did not take; they are sent again."
)

_PRIORITIES: Final[tuple[Priority, ...]] = get_args(Priority)
_CACHES = ("hit", "miss")
# Made once: looking a label up costs more than counting.
_WAITED = {priority: QUEUE_WAIT.labels(priority) for priority in _PRIORITIES}
_FIRST_TOKEN = {pair: FIRST_TOKEN.labels(*pair) for pair in product(_PRIORITIES, _CACHES)}
_PREFILL = {cache: PREFILL.labels(cache) for cache in _CACHES}
_EXPECTED, _FOUND = (PREFIX_TOKENS.labels(cache) for cache in ("expected", "found"))
_AS_EXPECTED, _LESS, _MORE = (PREDICTIONS.labels(found) for found in ("as_expected", "less", "more"))
_COMPUTED, _CACHED = PROMPT_TOKENS.labels("computed"), PROMPT_TOKENS.labels("cached")
for _outcome in ("warmed", "not_kept", "failed"):
    # A rate sees nothing of a series that begins at 1.
    WARMED.labels(_outcome)


def begun(
    priority: Priority,
    *,
    prompt_tokens: int,
    cached_tokens: int,
    waited_s: float,
    first_token_s: float,
    prefill_s: float | None,
) -> None:
    """Count a request whose first token has come. Clocks of two hosts may differ by a little, so no time is below 0."""
    cache = "hit" if cached_tokens else "miss"
    _WAITED[priority].observe(max(0.0, waited_s))
    _FIRST_TOKEN[priority, cache].observe(max(0.0, first_token_s))
    if prefill_s is not None:
        _PREFILL[cache].observe(prefill_s)
    _COMPUTED.inc(max(0, prompt_tokens - cached_tokens))
    _CACHED.inc(cached_tokens)


def predicted(expected_tokens: int, found_tokens: int, block_size: int) -> None:
    """Count what the KV cache had of a request's profile, beside what was expected; it has whole blocks only."""
    _EXPECTED.inc(expected_tokens)
    _FOUND.inc(found_tokens)
    if abs(found_tokens - expected_tokens) < block_size:
        _AS_EXPECTED.inc()
    elif found_tokens < expected_tokens:
        _LESS.inc()
    else:
        _MORE.inc()


def decoded(tokens: int, seconds: float | None) -> None:
    """Count the tokens of one frame, and the time since the frame before, if there was one."""
    OUTPUT_TOKENS.inc(tokens)
    if seconds is not None:
        INTER_TOKEN.observe(seconds / tokens)
