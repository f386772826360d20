"""`/v1/files`, as OpenAI's clients expect it: what batches read, and what they answer."""

from __future__ import annotations

from typing import Any, Literal

from flask import Blueprint, Response, g, jsonify, request
from pydantic import Field
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge

from gateway_app.api import reading
from gateway_app.api.attachment import attach
from gateway_app.api.pages import page
from gateway_app.batches import ids
from gateway_app.batches.files import Files, StoredFile
from gateway_app.batches.upload import receive
from gateway_app.governance.api_keys import ApiKeys
from tasks.db import Database
from tasks.errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType
from tasks.job import Frozen

#: What a multipart body may have beside the file.
_ENVELOPE_BYTES = 64 * 1024
#: What is read and thrown away of a body that is too large, so that the client gets the answer and not a reset.
_DRAIN_BYTES = 512 * 2**20
MAX_FILES_PAGE = 10_000


class FileQuery(Frozen):
    """Which files a list shows."""

    purpose: Literal["batch", "batch_output"] | None = None
    after: str | None = Field(default=None, pattern=ids.PATTERN, description="The last id of the page before.")
    limit: int = Field(default=MAX_FILES_PAGE, ge=1, le=MAX_FILES_PAGE)
    order: Literal["asc", "desc"] = "desc"


def blueprint(keys: ApiKeys, files: Files, database: Database, max_bytes: int) -> Blueprint:
    """Return the routes, over what they need. `max_bytes` is the largest file that may be uploaded."""
    routes = Blueprint("files", __name__, url_prefix="/v1/files")

    reading.require_key(routes, keys)

    @routes.post("")
    def create() -> Response:
        request.max_content_length = max_bytes + _ENVELOPE_BYTES
        if request.mimetype != "multipart/form-data":
            raise UnsupportedMediaType("a file is uploaded as multipart/form-data")
        try:
            boundary = request.mimetype_params.get("boundary", "")
            file_id = receive(files, database, g.caller, request.stream, boundary)
        except RequestEntityTooLarge:
            reading.drain()
            raise BodyTooLarge(f"the file is larger than {max_bytes} bytes", param="file") from None
        except ClientDisconnected:
            raise InvalidRequest("the connection ended before the body did") from None
        return jsonify(shown(files.find(file_id, g.caller.organization)))

    @routes.get("")
    def index() -> Response:
        wanted = reading.query(FileQuery)
        found = files.page(
            g.caller.organization, wanted.purpose, wanted.after, wanted.limit + 1, ascending=wanted.order == "asc"
        )
        return page([shown(file) for file in found], wanted.limit)

    @routes.get("/<file_id>")
    def show(file_id: str) -> Response:
        return jsonify(shown(files.find(file_id, g.caller.organization)))

    @routes.delete("/<file_id>")
    def delete(file_id: str) -> Response:
        files.delete(file_id, g.caller.organization)
        return jsonify(id=file_id, object="file", deleted=True)

    @routes.get("/<file_id>/content")
    def content(file_id: str) -> Response:
        file = files.find(file_id, g.caller.organization)
        response = Response(files.read(file), content_type="application/octet-stream")
        attach(response, file.filename)
        response.headers["Content-Length"] = str(file.size)
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    return routes


def shown(file: StoredFile) -> dict[str, Any]:
    """Return OpenAI's file object."""
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created_at.timestamp()),
        "expires_at": int(file.expires_at.timestamp()) if file.expires_at else None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
