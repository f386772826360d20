"""The model's folder and tokenizer, and the agents' profiles: what a gateway reads at its start."""

from __future__ import annotations

from collections.abc import Iterator

from gateway_app.doctor.finding import Finding, fail, ok
from tasks.errors import GatewayError
from tasks.prompts.profile import read_profiles
from tasks.prompts.tokenizer import ModelTokenizer, resolve_checkpoint
from tasks.settings import Settings


def examine(settings: Settings) -> Iterator[Finding]:
    """Load both."""
    engine = settings.engine
    try:
        tokenizer = ModelTokenizer(resolve_checkpoint(engine.model_source, engine.revision))
    except (GatewayError, OSError, ValueError) as error:
        says = (
            error.detail.partition("\n")[0]
            if isinstance(error, GatewayError)
            else f"{engine.model}: {type(error).__name__}"
        )
        yield fail("model", says, "METAQORE_ENGINE__MODEL=FOLDER")
    else:
        window = engine.max_model_len or tokenizer.max_model_len
        yield ok("model", f"{engine.model_name}: its tokenizer loads, its context window has {window:,} tokens")
    try:
        count = len(read_profiles(settings.governance.profiles_directory))
    except GatewayError as error:
        yield fail("profiles", error.detail, "flask profiles check")
    else:
        yield ok("profiles", f"{count} in {settings.governance.profiles_directory}")
