"""Every call that docs/profiles.md shows is run, in order, and does what it is there for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

PAGE = Path(__file__).parents[3] / "docs" / "profiles.md"
WITH_VALUE = ("-H", "-X", "-d", "-o", "--data-binary")


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return one kind of database: the statements are tried on both by the tests of switching and of canaries."""
    kind: str = request.param
    return kind


def calls() -> list[list[str]]:
    """Return the arguments of each curl in the page's examples."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    commands = [part for block in blocks for part in re.split(r"^(?=curl )", block, flags=re.MULTILINE)]
    return [shlex.split(command.replace("\\\n", " "))[1:] for command in commands if command.startswith("curl ")]


def send(client: FlaskClient, arguments: list[str], files: dict[str, bytes]) -> TestResponse:
    """Do what curl would; `files` are those it writes and reads."""
    given = iter(arguments)
    options: dict[str, list[str]] = {}
    url = ""
    for word in given:
        if word in WITH_VALUE:
            options.setdefault(word, []).append(next(given))
        else:
            url = word
    headers = dict(header.split(": ", 1) for header in options.get("-H", ()))
    assert headers.pop("Authorization") == "Bearer $KEY"
    content = options["-d"][0].encode() if "-d" in options else None
    if "--data-binary" in options:
        content = files[options["--data-binary"][0].removeprefix("@")]
    path = urlsplit(url)
    method = options.get("-X", ["GET" if content is None else "POST"])[0]
    answer = client.open(path.path, method=method, query_string=path.query, data=content, headers=headers)
    for name in options.get("-o", ()):
        files[name] = answer.data
    return answer


def test_the_examples(client: FlaskClient) -> None:
    """None is refused, and together they end where the page says."""
    files: dict[str, bytes] = {}
    answers = [send(client, arguments, files) for arguments in calls()]
    assert [answer.status_code // 100 for answer in answers] == [2] * len(answers), [each.text for each in answers]
    assert len(answers) == 14
    by_call = [answer.json for answer in answers]
    assert by_call[3]["data"][0]["action"] == "rolled_back"
    assert by_call[7]["behind"] == {"agent": "house-style", "pinned": 1, "active": 2}
    assert by_call[8]["active_version"] == 2
    assert (by_call[10]["version"], by_call[10]["share"]) == (2, 0.1)
    assert by_call[11]["active_version"] == 2
    assert by_call[13]["action"] == "unchanged"
