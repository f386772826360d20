"""Tools as OpenAI's clients describe them, and what a model may do with them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from tasks.errors import InvalidRequest, Unsupported
from tasks.job import Frozen, ToolUse

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Frozen):
    """A function the model may ask for."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON Schema.")
    strict: bool | None = None


class Tool(Frozen):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Frozen):
    """The name of a function."""

    name: FunctionName


class NamedTool(Frozen):
    """The one function to call."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def tool_use(
    tools: tuple[Tool, ...] | None, choice: ToolChoice | None, parallel: bool | None, parser: str | None
) -> ToolUse | None:
    """Return what the engine is told of tools; None if the model is to know of none.

    `parser` names the model's tool parser. Raises InvalidRequest if the choice fits no tool, Unsupported if what the
    model says of its own accord could not be parsed.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice wants a tool, and there are no tools", param="tool_choice")
        return None
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidRequest("two tools have the same name", param="tools")
    if choice == "none":
        return None
    wanted = f"function:{choice.function.name}" if isinstance(choice, NamedTool) else choice or "auto"
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise InvalidRequest("tool_choice names a function that is none of the tools", param="tool_choice")
    if wanted == "auto" and parser is None:
        raise Unsupported(
            "this gateway does not know how its model writes tool calls; use tool_choice required, or a function's name",
            param="tool_choice",
            setting="engine.tool_parser",
        )
    return ToolUse(
        tools=tuple(tool.model_dump(mode="json", exclude_none=True) for tool in tools),
        choice=wanted,
        parallel=parallel is not False,
    )
