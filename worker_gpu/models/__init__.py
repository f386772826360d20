"""Models that are prepared rather than found."""
