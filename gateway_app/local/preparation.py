"""What must be there before anything runs: secrets, tables, the model, an API key. All of it is made only once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from gateway_app.governance.api_keys import ApiKeys
from gateway_app.local.folder import Folder
from gateway_app.local.processes import kill
from gateway_app.local.progress import Progress
from gateway_app.local.secrets import create_secrets
from tasks.db import Database
from tasks.errors import AdminRequired, ConfigurationError, Unauthenticated
from tasks.migrating import upgrade
from tasks.settings import DEFAULT_MODEL, Settings

#: A program of its own, as the gateway knows nothing of workers.
MODEL_COMMAND = (sys.executable, "-m", "worker_gpu.models.smollm2")


def prepare(settings: Settings, folder: Folder, progress: Progress, database_url: str) -> None:
    """Make what is missing. Raises ConfigurationError, or another GatewayError, saying what would help."""
    if made := create_secrets(settings.secrets.directory):
        progress.say(f"made {len(made)} secrets in {settings.secrets.directory}")
    upgrade(database_url)
    prepare_model(settings, progress)
    prepare_api_key(settings, folder, progress)


def prepare_model(settings: Settings, progress: Progress) -> None:
    """Make the default model if it is the one to serve and is not there. Its tokenizer is needed in any case."""
    # The folder appears as the last step of making it, so one that exists is whole.
    if Path(settings.engine.model_source) != DEFAULT_MODEL or DEFAULT_MODEL.is_dir():
        return
    progress.say(f"preparing the model {DEFAULT_MODEL.name}, once for all checkouts of this user")
    with subprocess.Popen(  # noqa: S603  a command of this project
        MODEL_COMMAND, stdout=sys.stderr, stdin=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            status = process.wait()
        except BaseException:  # An interruption: the download that runs under it has to end too.
            kill(process)
            raise
    if status != 0:
        raise ConfigurationError("the model could not be prepared; the reason is above")


def prepare_api_key(settings: Settings, folder: Folder, progress: Progress) -> None:
    """Make the API key of the first curl, unless there is one that this database knows. It is an admin key."""
    database = Database(settings.database)
    try:
        keys = ApiKeys(database, settings.secrets.keys("key_pepper"))
        try:
            keys.authenticate(f"Bearer {folder.api_key.read_text('ascii').strip()}").require_admin()
        except (FileNotFoundError, UnicodeDecodeError, Unauthenticated, AdminRequired):
            # An unknown one is left of a database that was deleted, or was revoked: it opens nothing. One of a release
            # that had no admin keys goes on to work wherever it is used.
            folder.api_key.unlink(missing_ok=True)
            _, key = keys.create("default", "local", "admin")
            folder.write_private(folder.api_key, key + "\n")
            progress.say(f"made an API key: {os.path.relpath(folder.api_key, folder.root)}")
    finally:
        database.close()
