"""Housekeeping: what keeps every accepted request going when nobody asks about it.

A request is committed first and queued afterwards, so between the two, and whenever Redis loses data, SQL knows of a
request that Redis does not. The housekeeper finds such requests and publishes them again under a new epoch. It also
ends those whose deadline passed while they waited, and forgets old idempotency keys.

It is a Celery worker, `celery -A gateway_app.housekeeping worker -Q housekeeping`, of which any number may run and one
leads. `worker` is where Celery ends; `housekeeper` is the thread that does the chores in turn, and leads them;
`walk` reads the open requests from SQL, `losses` tells which of them Redis has lost and publishes those again, `mark`
notices that Redis lost everything at once, `ending` ends and forgets, `pins` tells Redis what is to be kept warm.
"""
