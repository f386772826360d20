"""The application that `celery -A worker_gpu worker -Q gpu` finds."""

from tasks.app import make_app

app = make_app()
