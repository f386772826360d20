"""What a bare `celery worker -Q gpu` reads, from the project's root."""

from tasks.app import configuration

globals().update(configuration())
