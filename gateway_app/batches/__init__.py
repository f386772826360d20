"""Files and batches: many requests in one upload, run when there is room, answered in one download."""
