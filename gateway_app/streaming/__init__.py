"""Bringing response streams from Redis to clients."""
