"""Prompts as values: profiles, their hashes, and their token ids. Knows nothing of queues, databases or HTTP."""
