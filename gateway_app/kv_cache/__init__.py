"""What the workers' KV caches hold of the profiles, over the whole fleet: for people to look at, who are told only of their own.

The queue's scripts decide by the same reports (docs/scheduling.md), inside Redis, and ask nothing of this.
"""
