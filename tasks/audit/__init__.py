"""The record of what happened to every request."""
