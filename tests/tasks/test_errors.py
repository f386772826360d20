"""The error tree is a part of the API: what each class says must help, and its code must stay its own."""

from __future__ import annotations

import inspect
import re
from http import HTTPStatus

import pytest

from tasks import errors
from tasks.errors import GatewayError

#: All classes of the tree, which has one home.
TREE = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, GatewayError)]
#: Statuses of the 4xx range that invite the client to try again.
RETRYABLE_CLIENT_STATUSES = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS}
every_error = pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)


def test_codes_are_unique() -> None:
    """A code has one class that states it. A subclass that states none shares its parent's, on purpose."""
    stated = [error.code for error in TREE if "code" in vars(error)]
    assert len(stated) == len(set(stated))


@every_error
def test_code_is_stable_and_short(error: type[GatewayError]) -> None:
    """Clients match codes and SQL stores them: lower case, words joined by underscores, at most 64 characters."""
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", error.code)
    assert len(error.code) <= 64


@every_error
def test_code_finds_its_class(error: type[GatewayError]) -> None:
    """A code read from the database leads back to the class that states it."""
    found = errors.by_code(error.code)
    assert found.code == error.code
    assert issubclass(error, found)


def test_unknown_code_is_a_plain_error() -> None:
    """A code of a newer release, or none, is still an error that can be shown."""
    assert errors.by_code("invented_tomorrow") is GatewayError
    assert errors.by_code(None) is GatewayError


@every_error
def test_status_is_an_error_status(error: type[GatewayError]) -> None:
    """The status is one HTTP knows, of the client's or the server's kind."""
    assert 400 <= HTTPStatus(error.status) <= 599


@every_error
def test_retryable_fits_the_status(error: type[GatewayError]) -> None:
    """Sending a wrong request again cannot help, and only what may be sent again says when."""
    if error.retryable:
        assert error.status >= 500 or error.status in RETRYABLE_CLIENT_STATUSES
    if error.retry_after_s is not None:
        assert error.retryable
        assert error.retry_after_s > 0


@every_error
def test_docstring_is_a_message(error: type[GatewayError]) -> None:
    """The docstring's first line is a sentence that users read; it is the detail where nothing more exact is known."""
    assert vars(error).get("__doc__"), "a docstring is not inherited"
    title = error.title()
    assert title[0].isupper()
    assert title.endswith(".")
    assert len(title) <= 100
    assert error().detail == str(error()) == title


@every_error
def test_hint_says_what_to_do(error: type[GatewayError]) -> None:
    """A hint is one or more sentences."""
    assert error.hint == error.hint.strip()
    assert error.hint[:1].isupper() or error.hint.startswith("`")
    assert error.hint.endswith(".")


def test_instance_may_say_more() -> None:
    """A detail replaces the title, and extensions travel with the instance only."""
    error = errors.PromptTooLong("9,000 tokens do not fit 8,192", prompt_tokens=9000)
    assert (error.detail, str(error)) == ("9,000 tokens do not fit 8,192", "9,000 tokens do not fit 8,192")
    assert error.extensions == {"prompt_tokens": 9000}
    assert errors.PromptTooLong().extensions == {}
