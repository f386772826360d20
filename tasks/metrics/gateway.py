"""What a gateway tells: HTTP, streams, and the queue that all gateways share, of which each tells the same."""

from __future__ import annotations

from tasks.metrics.making import GATEWAY, Reading, counter, gauge, histogram
from tasks.metrics.shared import ERROR_CODES

_HTTP_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

HTTP_REQUESTS = counter(
    GATEWAY,
    "metaqore_http_requests_total",
    "HTTP requests that were answered, by method, route template and status; 101 is a WebSocket.",
    ("method", "route", "status"),
)
HTTP_SECONDS = histogram(
    GATEWAY,
    "metaqore_http_request_seconds",
    "From a request's headers until its answer begins; of a stream, until its first byte. WebSockets are left out.",
    _HTTP_S,
    ("method", "route"),
)
HTTP_ERRORS = counter(GATEWAY, "metaqore_http_errors_total", "Error answers by their stable code.", ("code",))
HTTP_IN_PROGRESS = gauge(
    GATEWAY, "metaqore_http_requests_in_progress", "Requests that hold a thread now; WebSockets do, streams do not."
)
THREADS = Reading(GATEWAY, "metaqore_http_threads", "Requests that may hold a thread at once (`gateway.threads`).")
STREAMS = Reading(GATEWAY, "metaqore_streams_open", "Event streams that are being served by the loop now.")
SOCKETS = Reading(GATEWAY, "metaqore_sockets_open", "WebSockets that are open now.")
SOCKETS_LIMIT = Reading(
    GATEWAY, "metaqore_sockets_limit", "WebSockets that may be open at once (`streaming.max_sockets`)."
)
UNPUBLISHED = counter(
    GATEWAY,
    "metaqore_publish_failures_total",
    "Accepted requests that Redis did not take at once; the housekeeper queues them.",
)
QUEUE_UP = Reading(GATEWAY, "metaqore_queue_up", "1 if Redis answered when it was last asked about the queue, else 0.")
QUEUE_REQUESTS = Reading(
    GATEWAY, "metaqore_queue_requests", "Requests that wait, retries after their pause included.", ("priority",)
)
QUEUE_TOKENS = Reading(GATEWAY, "metaqore_queue_tokens", "Prompt tokens of the requests that wait.")
QUEUE_OLDEST = Reading(
    GATEWAY,
    "metaqore_queue_oldest_seconds",
    "For how long the longest-waiting request of a priority has waited; 0 if none waits.",
    ("priority",),
)
QUEUE_DELAYED = Reading(GATEWAY, "metaqore_queue_delayed_requests", "Of those that wait, retries still in their pause.")
QUEUE_LEASED = Reading(GATEWAY, "metaqore_queue_leased_requests", "Requests that workers hold under a lease.")
QUEUE_RENEWED = Reading(
    GATEWAY, "metaqore_queue_oldest_renewal_seconds", "Age of the lease that was renewed longest ago; 0 without leases."
)
QUEUE_LIMIT = Reading(
    GATEWAY,
    "metaqore_queue_limit",
    "How much may wait before requests are refused; a limit that is off is left out.",
    ("what",),
)
WANTED = Reading(
    GATEWAY, "metaqore_wanted_profiles", "Profiles that workers shall have computed: pinned, or about to become active."
)
WORKERS = Reading(
    GATEWAY, "metaqore_workers", "GPU workers with a heartbeat, by what they say of themselves.", ("state",)
)
CACHE_TOKENS = Reading(
    GATEWAY,
    "metaqore_cache_tokens",
    "Tokens of all workers' KV caches: `capacity`, of `known` prefixes, and `free` without evicting one of these.",
    ("part",),
)
HOUSEKEEPER_LEADS = Reading(GATEWAY, "metaqore_housekeeper_leads", "1 if some housekeeper leads, else 0.")

for _code in ERROR_CODES:
    # A rate sees nothing of a series that begins at 1.
    HTTP_ERRORS.labels(_code)
