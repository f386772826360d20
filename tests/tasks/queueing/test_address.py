"""The URL of the queue says which servers there are, and how to reach them; a wrong one is refused at the start."""

from __future__ import annotations

from urllib.parse import quote

import kombu
import pytest

from tasks.app import configuration
from tasks.queueing.address import Address, parse
from tasks.settings import settings


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://127.0.0.1:6379/0", Address((("127.0.0.1", 6379),))),
        ("redis://cache", Address((("cache", 6379),))),
        ("redis://cache/7", Address((("cache", 6379),), db=7)),
        ("redis://[::1]:7000/1", Address((("::1", 7000),), db=1)),
        ("redis://:p%40ss%2F@cache", Address((("cache", 6379),), 0, None, "p@ss/")),
        ("redis://me:secret@cache:1/2", Address((("cache", 1),), 2, "me", "secret")),
        (
            "rediss://cache",
            Address((("cache", 6379),), tls={"ssl_cert_reqs": "required", "ssl_check_hostname": True}),
        ),
        (
            "rediss://cache?ssl_ca_certs=/ca.pem&ssl_certfile=/me.pem&ssl_keyfile=/me.key&ssl_check_hostname=false",
            Address(
                (("cache", 6379),),
                tls={
                    "ssl_ca_certs": "/ca.pem",
                    "ssl_certfile": "/me.pem",
                    "ssl_keyfile": "/me.key",
                    "ssl_cert_reqs": "required",
                    "ssl_check_hostname": False,
                },
            ),
        ),
        (
            "rediss://cache/3?ssl_cert_reqs=none",
            Address((("cache", 6379),), 3, tls={"ssl_cert_reqs": "none", "ssl_check_hostname": False}),
        ),
        (
            "sentinel://:pw@one;sentinel://two:5000/4?master_name=mq&sentinel_password=sp",
            Address((("one", 26379), ("two", 5000)), 4, None, "pw", None, "mq", "sp"),
        ),
        ("sentinel://one/0?master_name=mq", Address((("one", 26379),), master_name="mq")),
    ],
)
def test_parsed(url: str, expected: Address) -> None:
    """Each part of the URL, with what is usual for what is left out."""
    assert parse(url) == expected


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://cache", "must start with"),
        ("", "must start with"),
        ("cache:6379", "must start with"),
        ("redis://one;redis://two", "only sentinel"),
        ("sentinel://one;redis://two?master_name=mq", "only sentinel"),
        ("redis://cache/zero", "database's number"),
        ("redis://cache/0/1", "database's number"),
        ("redis://cache?ssl_ca_certs=/ca.pem", "does not take ssl_ca_certs"),
        ("rediss://cache?ca=/ca.pem", "does not take ca"),
        ("rediss://cache?ssl_cert_reqs=maybe", "required, optional or none"),
        ("rediss://cache?ssl_check_hostname=maybe", "true or false"),
        ("sentinel://one", r"needs \?master_name="),
        ("sentinel://one?master_name=", r"needs \?master_name="),
        ("redis://cache:port", "port"),
        ("redis://cache:99999", "Port"),
        ("redis://cache?x", "bad query"),
    ],
)
def test_refused(url: str, problem: str) -> None:
    """With a reason, in which no part of a password is."""
    with pytest.raises(ValueError, match=problem) as caught:
        parse(url.replace("://", "://:hunter2@"))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("password", ["p@ss/w:rd?#%;", "ü", "a b"])
def test_a_password_reaches_kombu(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in it."""
    monkeypatch.setenv("REDIS_URL", f"redis://me:{quote(password, safe='')}@cache:7000/3")
    settings.cache_clear()
    connection = kombu.Connection(configuration()["broker_url"])
    assert (connection.userid, connection.password, connection.hostname, connection.port) == (
        "me",
        password,
        "cache",
        7000,
    )
    assert connection.virtual_host == "3"
    assert password not in repr(parse(settings().gateway.request_queue_url))
