"""Every metric: its name, what it tells, its labels and buckets. docs/metrics.md is the same as a page.

There are two kinds. **Instruments** count what happens where it happens: whoever commits, sends or loses something calls
one of them, and pays about a microsecond. **Readings** are looked up only when somebody asks, from what knows them
anyway: a pool, a queue, an engine.

A label's values come from a closed set that this code knows: routes, codes of `tasks.errors`, states, priorities. None is
ever a client's text, an id, an organization, an agent or a hash, so the number of series does not grow with use.

Which process tells a metric is part of its definition. Each has one registry: gunicorn runs one worker process, so a
gateway is one process, and more processes are more gateways to scrape.
"""
