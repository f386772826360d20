"""The queue: one Redis list a profile hash, behind one Celery queue."""
