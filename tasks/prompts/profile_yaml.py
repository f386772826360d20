"""YAML for profiles, read as if from an enemy and written so that it reads back to the letter.

Of YAML only what profiles need is taken: mappings, lists and scalars. Anchors, aliases, merge keys and tags are refused,
so nothing can grow when it is read or make objects; so are keys that are given twice, of which YAML would silently
take the last. Depth and the number of nodes are bounded while reading. An error tells where and what, and never repeats
what was read, which may be a prompt.

PyYAML's block style does not read back everything it writes (some line ends, blanks at the ends). Text that might be
changed by it is written in double quotes, where every character can be escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

MAX_FILE_BYTES = 2**20
MAX_DEPTH = 16
MAX_NODES = 20_000
#: What a word without quotes may be, other than text. "merge" is only known in order to be refused.
_WORDS = frozenset({"null", "bool", "int", "float", "merge"})
_MERGE = "tag:yaml.org,2002:merge"
#: Lines of plain printable text that end in no blank; the first begins with none.
_BLOCK = re.compile(r"[!-~][ -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe]*(\n[ -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe]*)+")
_BLANK_END = re.compile(r"\s$|[^\S\n]\n")


class BadYaml(ValueError):
    """What was read is no YAML, or YAML of a kind that is not taken. The message repeats nothing of it."""


def load(content: bytes) -> Any:
    """Return the one document in `content`, which is UTF-8. Raises BadYaml."""
    if len(content) > MAX_FILE_BYTES:
        raise BadYaml(f"larger than {MAX_FILE_BYTES} bytes")
    try:
        return yaml.load(content.decode("utf-8-sig"), _StrictLoader)  # noqa: S506  a SafeLoader that takes less
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadYaml(f"{error.problem if isinstance(error, _Refused) else 'not valid YAML'}{where}") from None
    except UnicodeDecodeError:
        raise BadYaml("not encoded as UTF-8") from None
    except (yaml.YAMLError, ValueError):
        # A character that YAML does not allow; a number or date that Python does not.
        raise BadYaml("not valid YAML: a character, number or date that cannot be read") from None


def dump(document: Mapping[str, Any]) -> str:
    """Return mappings, lists and scalars as YAML that `load` reads back the same."""
    return yaml.dump(document, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=2**31)


class _Refused(yaml.MarkedYAMLError):
    """The document holds something that is YAML and not taken."""


def _refuse(problem: str, place: Any) -> _Refused:
    return _Refused(problem=problem, problem_mark=place.start_mark)


class _StrictLoader(yaml.SafeLoader):
    # A date is text, as a profile has no use for one. Others in this process may change what SafeLoader makes of words.
    yaml_implicit_resolvers = {  # noqa: RUF012  as PyYAML declares it
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in _WORDS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refuse("anchors and aliases are not allowed", event)
        if getattr(event, "tag", None) is not None:
            raise _refuse("tags are not allowed", event)
        self._nodes += 1
        if self._depth >= MAX_DEPTH or self._nodes > MAX_NODES:
            raise _refuse(f"more than {MAX_DEPTH} levels or {MAX_NODES} nodes", event)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag == _MERGE:
                raise _refuse("a key must be a word", key)
            if key.value in seen:
                raise _refuse("a key is given more than once", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  as PyYAML calls it
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    block = _BLOCK.fullmatch(text) and not _BLANK_END.search(text.removesuffix("\n"))
    plain = text.isascii() and text.isprintable() and text == text.strip()
    style = "|" if block else None if plain else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
