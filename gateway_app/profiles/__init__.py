"""Agent profiles: files that were shipped, and versions that organizations put in their place.

- `rows` → `sealing` → `store`: an organization's versions in SQL, their text sealed
- `shipped`, `active`, `cache`, `canary` → `finder`: what an agent's requests get; read `finder` first
- `drafts` → `editor` → `changes`: what an organization writes
- `inheritance`, `trial` → `switching` → `transitions` → `history`: which version requests get, and the record of that
- `wishes` → `warming`, `pinned` → `pins`: what workers compute before requests ask for it, and keep computed
- `catalogue`, `comparison`, `transfer`: what it is shown of them, and takes along as YAML

`management` puts the last four together for the routes.
"""

from gateway_app.profiles.active import ActiveProfile
from gateway_app.profiles.finder import Profiles

__all__ = ["ActiveProfile", "Profiles"]
