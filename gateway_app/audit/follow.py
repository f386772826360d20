"""Keeps MetaQore's own files up to date: each event of the record is appended once, also if the follower is killed.

    read a batch → note what is about to be appended → append, to the disk → note that it is done

Events come in the order of their commits (`commits`), so a batch can be read again and is the same. A follower that was
killed between the two notes finds the first one when it starts again, reads the same batch, looks in each file from where
the note says for events of it, and appends the others. Lines that MetaQore wrote in between stay where they are.

A file that was moved away or cut short is begun anew with the next event. Only if that happens while the follower
lies killed between its two notes, what was written of that one batch is written again to the new file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from gateway_app.audit import checkpoint, commits
from gateway_app.audit.checkpoint import Checkpoint
from gateway_app.audit.commits import Commits
from gateway_app.audit.trail import EventName, contract_event, line
from gateway_app.audit.trail_file import TrailFile, file_name
from tasks.db import Database
from tasks.errors import DatabaseUnavailable, FollowRefused

#: Events appended between two checkpoints; each may belong to another organization, with a file of its own that is open.
BATCH = 500
#: How long events may wait behind a transaction before that is said.
_HELD_BACK_S = 60.0
Batch = dict[str, dict[EventName, bytes]]


class Follower:
    """Follows the events of one organization, or of all if it is None, into `folder`, whose lock the caller holds.

    `say` is told what an operator should know. Raises FollowRefused if what is there does not fit.
    """

    def __init__(self, database: Database, organization: str | None, folder: Path, say: Callable[[str], None]) -> None:
        self._database = database
        self._folder = folder
        self._say = say
        self._held_back_since: float | None = None
        self.appended = 0
        #: Organizations without a file, since none can be named by them.
        self.left_out: set[str] = set()
        only = None if organization is None else file_name(organization)
        found = checkpoint.read(folder)
        if found is None:
            self._refuse_earlier_events([folder / only] if only else sorted(folder.glob(file_name("*"))))
            found = Checkpoint(organization=organization)
            checkpoint.write(folder, found)
        if found.organization != organization:
            whose = "all organizations" if found.organization is None else f"organization {found.organization}"
            raise FollowRefused(f"{folder} is followed into for {whose}; use another folder")
        self._checkpoint = found

    def run(self, stop: threading.Event, interval_s: float) -> None:
        """Follow until `stop` is set, which ends it after the batch at hand. The database may go away and come back."""
        away = False
        while not stop.is_set():
            try:
                found = self.step()
            except DatabaseUnavailable:
                if not away:
                    self._say("the database cannot be reached; trying again")
                away, found = True, 0
            else:
                away = False
            if not found:
                stop.wait(interval_s)

    def catch_up(self, stop: threading.Event) -> None:
        """Follow what there is, or until `stop` is set. Raises DatabaseUnavailable."""
        while not stop.is_set() and self.step():
            pass

    def step(self) -> int:
        """Append the next batch; return of how many events it was, those of other organizations included."""
        intent = self._checkpoint.intent
        limit = intent.events if intent else BATCH
        found = self._database.read(lambda connection: commits.after(connection, self._checkpoint.last_name, limit))
        self._watch(found)
        if intent and len(found.rows) < intent.events:
            raise FollowRefused("the record holds fewer events than were read from it before: it is an older copy")
        if found.rows:
            self._append(self._lines(found), len(found.rows))
            self._keep(self._checkpoint.done(EventName.of(found.rows[-1])))
        return len(found.rows)

    def _append(self, batch: Batch, events: int) -> None:
        """Append a batch of lines, by file and event, but for what an earlier try has appended of it."""
        if not batch:
            return
        tried = self._checkpoint.intent.files if self._checkpoint.intent else {}
        with ExitStack() as stack:
            files = {name: stack.enter_context(TrailFile(self._folder, name)) for name in batch}
            sizes = {name: file.size() for name, file in files.items()}
            there: dict[str, set[EventName]] = {}
            for name in files.keys() & tried.keys():
                # A file that is shorter now is another one, or was emptied: it is looked at from its beginning.
                sizes[name] = tried[name] if tried[name] <= sizes[name] else 0
                there[name] = files[name].written_since(sizes[name], batch[name])
            self._keep(self._checkpoint.intending(events, sizes))
            for name, file in files.items():
                missing = [content for event, content in batch[name].items() if event not in there.get(name, ())]
                # Also if nothing is missing: what was written before may not have reached the disk.
                file.append(b"".join(missing))
                self.appended += len(missing)

    def _lines(self, found: Commits) -> Batch:
        """Return the lines of the events that are followed, by file and event."""
        batch: Batch = {}
        for row in found.rows:
            organization = row["organization"]
            if self._checkpoint.organization in (None, organization):
                try:
                    name = file_name(organization)
                except FollowRefused as refusal:
                    if organization not in self.left_out:
                        self.left_out.add(organization)
                        self._say(f"left out organization {organization!a}: {refusal.detail}")
                else:
                    batch.setdefault(name, {})[EventName.of(row)] = line(contract_event(row))
        return batch

    def _keep(self, new: Checkpoint) -> None:
        checkpoint.write(self._folder, new)
        self._checkpoint = new

    def _watch(self, found: Commits) -> None:
        """Say so once if events wait behind somebody's transaction for long."""
        if not found.held_back:
            self._held_back_since = None
        elif self._held_back_since is None:
            self._held_back_since = time.monotonic()
        elif time.monotonic() - self._held_back_since > _HELD_BACK_S:
            self._held_back_since = float("inf")
            self._say("events wait behind a transaction that has been running for long; see pg_stat_activity")

    def _refuse_earlier_events(self, paths: Sequence[Path]) -> None:
        for path in filter(Path.exists, paths):
            with TrailFile(self._folder, path.name) as file:
                if file.holds_any():
                    raise FollowRefused(
                        f"{path} holds events of the gateway, and {self._folder} has no checkpoint that says which"
                    )
