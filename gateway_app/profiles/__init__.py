"""Agent profiles: files that were shipped, and versions that organizations put in their place.

- `rows` → `sealing` → `store`: an organization's versions in SQL, their text sealed
- `shipped`, `active`, `cache` → `finder`: what an agent's requests get; read `finder` first
- `drafts` → `editor` → `changes`: what an organization may do to its agents
- `catalogue`, `comparison`: what it is shown of them
"""

from gateway_app.profiles.active import ActiveProfile
from gateway_app.profiles.finder import Profiles

__all__ = ["ActiveProfile", "Profiles"]
