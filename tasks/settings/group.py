"""What all groups of settings share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

ExpandedPath = Annotated[Path, AfterValidator(Path.expanduser)]


class Group(BaseModel):
    """Base of the setting groups: unknown keys are errors, values do not change after the start."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
