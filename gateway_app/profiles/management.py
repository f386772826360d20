"""What the routes under /v1/profiles are made over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway_app.profiles.canary import CanaryFigures
from gateway_app.profiles.catalogue import Catalogue
from gateway_app.profiles.changes import ProfileChanges
from gateway_app.profiles.editor import ProfileEditor
from gateway_app.profiles.finder import Profiles
from gateway_app.profiles.history import History
from gateway_app.profiles.inheritance import Bases
from gateway_app.profiles.pins import Pins
from gateway_app.profiles.switching import ProfileSwitch
from gateway_app.profiles.transfer import Transfer
from gateway_app.profiles.transitions import Transitions
from gateway_app.profiles.trial import Trial
from gateway_app.profiles.warming import Warming, Warmth
from gateway_app.profiles.wishes import Wishes
from tasks.crypto import KeyWrapper
from tasks.db import Database
from tasks.settings import ProfilesGroup


@dataclass(frozen=True, slots=True)
class ProfileManagement:
    """Shows, changes, switches, exports and imports profiles."""

    catalogue: Catalogue
    editor: ProfileEditor
    switch: ProfileSwitch
    pins: Pins
    history: History
    figures: CanaryFigures
    transfer: Transfer


def manage(
    profiles: Profiles,
    database: Database,
    keys: KeyWrapper,
    context_window: int,
    limits: ProfilesGroup,
    wishes: Wishes | None = None,
    told: Callable[[Warmth], None] = lambda _: None,
) -> ProfileManagement:
    """Return the management of `profiles`. `context_window` is the served model's, in tokens.

    `told` hears how far a version is computed that becomes active; without `wishes` none is computed beforehand.
    """
    bases, trial = Bases(profiles, limits.max_depth), Trial(profiles, context_window)
    changes = ProfileChanges(database, keys, limits)
    transitions = Transitions(database, keys, limits)
    warming = Warming(wishes, profiles.prefixes.store, limits, told)
    pins = Pins(profiles, transitions, database, wishes, limits)
    editor = ProfileEditor(profiles, changes, bases, trial, warming, pins, limits)
    return ProfileManagement(
        catalogue=Catalogue(profiles, bases),
        editor=editor,
        switch=ProfileSwitch(profiles, transitions, editor, bases, trial, warming, pins, limits),
        pins=pins,
        history=History(database),
        figures=CanaryFigures(database),
        transfer=Transfer(profiles.store, profiles.shipped, changes, limits),
    )
