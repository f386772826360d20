"""Lines are cut right wherever chunks end, and whatever is on them is judged without harm."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_app.batches.files import CHUNK_BYTES, Files
from gateway_app.batches.lines import MAX_CUSTOM_ID, LineReader, Problem, check, split
from gateway_app.governance.api_keys import Caller
from tasks.db import Database
from tests.gateway_app.batches.fakes import URL, jsonl, line, store

MAX_BYTES = 1000


@given(st.lists(st.sampled_from([b"a", b"\n", b"\r\n", b"bcd", b"x" * 30, b" "])), st.integers(1, 40))
def test_cutting(pieces: list[bytes], size: int) -> None:
    """What is yielded lies where it says, in order, and leaves nothing out."""
    content = b"".join(pieces)
    chunks = [content[start : start + size] for start in range(0, len(content), size)]
    lines = list(split(chunks, 25))
    expected = content.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert [found.number for found in lines] == list(range(1, len(expected) + 1))
    for found, text in zip(lines, expected, strict=True):
        assert content[found.offset : found.offset + found.length] == text
        assert found.content == (text if len(text) <= 25 else None)
        assert found.blank == (found.content is not None and not text.strip())


def test_a_byte_order_mark() -> None:
    """Windows puts one before the first line, which is JSON all the same; elsewhere it is not."""
    mark = b"\xef\xbb\xbf"
    first, second = split([mark + b"{}\n" + mark + b"{}"], 100)
    assert (first.offset, first.length, first.content) == (3, 2, b"{}")
    assert second.content == mark + b"{}"


BAD = {
    "not JSON": (b"{", "invalid_json_line"),
    "no object": (b"[]", "invalid_json_line"),
    "text": (b'"x"', "invalid_json_line"),
    "NaN": (b'{"custom_id": "a", "body": {"x": NaN}}', "invalid_json_line"),
    "not UTF-8": (b'{"custom_id": "\xff"}', "invalid_json_line"),
    "a lone surrogate": (b'{"custom_id": "\\ud800"}', "invalid_json_line"),
    "nested too deep": (b'{"body": ' + b"[" * 400 + b"]" * 400 + b"}", "invalid_json_line"),
    "two objects": (b"{} {}", "invalid_json_line"),
    "a NUL": (b"\x00", "invalid_json_line"),
    "too long": (b" " * 2000 + b"{}", "line_too_long"),
    "no custom_id": (b"{}", "missing_required_parameter"),
    "an empty custom_id": (jsonl(line("")), "missing_required_parameter"),
    "a number for custom_id": (jsonl(line("a", custom_id=5)), "missing_required_parameter"),
    "a long custom_id": (jsonl(line("a", custom_id="x" * (MAX_CUSTOM_ID + 1))), "invalid_custom_id"),
    "a NUL in custom_id": (jsonl(line("a\x00")), "invalid_custom_id"),
    "a line feed in custom_id": (jsonl(line("a\nb")), "invalid_custom_id"),
    "GET": (jsonl(line("a", method="GET")), "invalid_method"),
    "no method": (jsonl(line("a", method=None)), "invalid_method"),
    "another url": (jsonl(line("a", url="/v1/embeddings")), "url_mismatch"),
    "a whole url": (jsonl(line("a", url="https://api.openai.com" + URL)), "url_mismatch"),
    "a list of urls": (jsonl(line("a", url=[URL])), "url_mismatch"),
    "no body": (jsonl(line("a", body=None)), "missing_required_parameter"),
    "a text for body": (jsonl(line("a", body="{}")), "missing_required_parameter"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines(name: str) -> None:
    """Each has its code and the number of its line, and nothing of it is repeated."""
    content, code = BAD[name]
    *_, found = split([b"\n\n" + content], MAX_BYTES)
    problem = check(found, URL, MAX_BYTES)
    assert isinstance(problem, Problem)
    assert (problem.code, problem.line) == (code, 3)
    assert "embeddings" not in problem.message


@pytest.mark.parametrize("custom_id", ["a", "ü-ñ-🦊", "x" * MAX_CUSTOM_ID, "'; DROP TABLE batches; --", " "])
def test_good_lines(custom_id: str) -> None:
    """A custom_id is any text; what is unknown beside it is left alone; line ends of Windows are blanks."""
    content = json.dumps(line(custom_id, extra=1)).encode() + b"\r"
    [found] = split([content], 10_000)
    assert check(found, URL, 10_000) == custom_id


@given(st.binary(max_size=60) | st.builds(lambda value: json.dumps(value).encode(), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["custom_id", "method", "url", "body", "x"]), inner, max_size=5),
)))  # fmt: skip
def test_anything(content: bytes) -> None:
    """No line raises."""
    for found in split([content], MAX_BYTES):
        checked = check(found, URL, MAX_BYTES)
        assert isinstance(checked, str | Problem)


def test_reading_again(files: Files, database: Database, caller: Caller) -> None:
    """A line is found by its place, also one that lies across chunks, in any order."""
    bodies = [
        {"name": f"r-{number}", "pad": "x" * size} for number, size in enumerate((10, CHUNK_BYTES, 5, 600_000, 20))
    ]
    content = jsonl(*(line(body["name"], body=body) for body in bodies))
    file = files.find(store(files, database, caller, content), "default")
    places = [(found.offset, found.length) for found in split(files.read(file), 10**6)]
    reader = LineReader(files, file)
    for index in (0, 3, 1, 4, 2, 0, 0):
        read: Any = reader.body(*places[index])
        assert read == bodies[index]
    with pytest.raises(ValueError, match="no request"):
        reader.body(places[0][0], places[0][1] - 1)
