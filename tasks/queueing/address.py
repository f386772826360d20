"""Where Redis is, from the URL in the settings: one server, with TLS or without, or a group that Sentinel watches.

    redis://[user:password@]host[:port][/db]
    rediss://…[?ssl_ca_certs=FILE&ssl_certfile=FILE&ssl_keyfile=FILE&ssl_cert_reqs=required&ssl_check_hostname=true]
    sentinel://[user:password@]host[:port][;sentinel://host[:port]…][/db]?master_name=NAME[&sentinel_password=…]

Of the servers that Sentinel names, the password is the first URL's; connections to them are without TLS. What Sentinel
itself wants to be asked with is `sentinel_password`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

SENTINEL_PORT = 26379
REDIS_PORT = 6379
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_PARAMETERS = {
    "redis": (),
    "rediss": (*_FILES, "ssl_cert_reqs", "ssl_check_hostname"),
    "sentinel": ("master_name", "sentinel_password"),
}


@dataclass(frozen=True, slots=True)
class Address:
    """A Redis. `hosts` are (name, port), of Sentinels if there is a `master_name`; `tls` is as redis-py calls it."""

    hosts: tuple[tuple[str, int], ...]
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: dict[str, Any] | None = None
    master_name: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)


def parse(url: str) -> Address:
    """Return where `url` leads. Raises ValueError, which says what is wrong with it and shows nothing of it."""
    first, *others = [urlsplit(part) for part in url.split(";")]
    last = others[-1] if others else first
    scheme = first.scheme
    if scheme not in _PARAMETERS:
        raise ValueError("must start with redis://, rediss:// or sentinel://")
    if others and (scheme != "sentinel" or any(part.scheme != scheme for part in others)):
        raise ValueError("only sentinel:// takes several servers, each written as sentinel://host:port")
    query = dict(parse_qsl(last.query, keep_blank_values=True, strict_parsing=bool(last.query)))
    if wrong := sorted(query.keys() - set(_PARAMETERS[scheme])):
        raise ValueError(
            f"does not take {', '.join(wrong)}; {scheme}:// knows {_PARAMETERS[scheme] or 'no parameters'}"
        )
    if scheme == "sentinel" and not query.get("master_name"):
        raise ValueError("needs ?master_name= with sentinel://")
    path = last.path.strip("/")
    if not (path == "" or path.isdecimal()):
        raise ValueError("must end with the database's number, as in redis://host:6379/0")
    port = SENTINEL_PORT if scheme == "sentinel" else REDIS_PORT
    return Address(
        hosts=tuple((unquote(part.hostname or "127.0.0.1"), part.port or port) for part in (first, *others)),
        db=int(path or 0),
        username=unquote(first.username) if first.username else None,
        password=unquote(first.password) if first.password else None,
        tls=_tls(query) if scheme == "rediss" else None,
        master_name=query.get("master_name"),
        sentinel_password=query.get("sentinel_password"),
    )


def _tls(query: dict[str, str]) -> dict[str, Any]:
    required = query.get("ssl_cert_reqs", "required")
    if required not in ("required", "optional", "none"):
        raise ValueError("ssl_cert_reqs must be required, optional or none")
    checked = query.get("ssl_check_hostname", str(required != "none")).lower()
    if checked not in ("true", "false"):
        raise ValueError("ssl_check_hostname must be true or false")
    files = {name: query[name] for name in _FILES if name in query}
    return {**files, "ssl_cert_reqs": required, "ssl_check_hostname": checked == "true"}
