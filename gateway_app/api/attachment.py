"""What a download is called."""

from __future__ import annotations

from urllib.parse import quote

from flask import Response

#: What may stand in an extended parameter as it is (RFC 8187, attr-char), beside letters and digits.
_PLAIN = "!#$&+-.^_`|~"


def attach(response: Response, filename: str) -> None:
    """Have clients save the response as `filename`. Headers hold Latin-1 alone, so other names go encoded (RFC 6266)."""
    names = {"filename": filename}
    if not filename.isascii():
        plain = filename.encode("ascii", "replace").decode("ascii").replace("?", "_")
        names = {"filename": plain, "filename*": f"UTF-8''{quote(filename, safe=_PLAIN, errors='replace')}"}
    response.headers.set("Content-Disposition", "attachment", **names)
