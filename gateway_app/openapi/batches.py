"""`/v1/files` and `/v1/batches`: the operations."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gateway_app.api.batches import BatchBody, BatchQuery
from gateway_app.api.files import FileQuery
from gateway_app.batches.upload import Upload
from gateway_app.openapi.answers.batches import Batch, BatchPage, File, FileDeleted, FilePage
from gateway_app.openapi.operation import READS_JSON, Link, Operation, Reply
from tasks.errors import (
    AlreadyFinished,
    BodyTooLarge,
    FileInUse,
    InvalidRequest,
    NotFound,
    UnsupportedMediaType,
)


class UploadForm(Upload):
    """An upload: its purpose, how long it is kept, and the file itself, with a filename."""

    file: bytes = Field(json_schema_extra={"format": "binary"}, description="A JSON object a line.")


HAS_FILE = {"file_id": "$response.body#/id"}
HAS_BATCH = {"batch_id": "$response.body#/id"}
BODY: dict[str, Any] = {
    "input_file_id": "file-019d0c3a5b7e7c21a4f06d1e8b3c9f52",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
}

FILES = (
    Operation(
        "post",
        "/v1/files",
        "createFile",
        "OpenAI",
        "Upload a file",
        {
            200: Reply(
                "It is stored, encrypted.",
                File,
                links=(
                    *(Link(name, HAS_FILE) for name in ("getFile", "deleteFile", "getFileContent")),
                    Link("createBatch", body={**BODY, "input_file_id": "$response.body#/id"}),
                ),
            )
        },
        errors=(UnsupportedMediaType, BodyTooLarge, InvalidRequest),
        body=UploadForm,
        body_media_type="multipart/form-data",
        bodies={"lines": {"purpose": "batch", "file": "{}\n"}},
    ),
    Operation(
        "get",
        "/v1/files",
        "listFiles",
        "OpenAI",
        "List the files",
        {200: Reply("A page of them.", FilePage)},
        errors=(InvalidRequest,),
        query=FileQuery,
    ),
    Operation(
        "get",
        "/v1/files/{file_id}",
        "getFile",
        "OpenAI",
        "Show a file",
        {200: Reply("It is there.", File)},
        errors=(NotFound,),
    ),
    Operation(
        "delete",
        "/v1/files/{file_id}",
        "deleteFile",
        "OpenAI",
        "Erase a file",
        {200: Reply("It is gone.", FileDeleted, links=(Link("getFile", HAS_FILE),))},
        errors=(NotFound, FileInUse),
    ),
    Operation(
        "get",
        "/v1/files/{file_id}/content",
        "getFileContent",
        "OpenAI",
        "Download a file",
        {200: Reply("Its bytes.", bytes_types=("application/octet-stream",), headers=("Content-Disposition",))},
        errors=(NotFound,),
    ),
)
BATCHES = (
    Operation(
        "post",
        "/v1/batches",
        "createBatch",
        "OpenAI",
        "Begin a batch over an uploaded file",
        {200: Reply("It is begun.", Batch, links=tuple(Link(name, HAS_BATCH) for name in ("getBatch", "cancelBatch")))},
        errors=(*READS_JSON, NotFound),
        body=BatchBody,
        bodies={"chat": BODY},
    ),
    Operation(
        "get",
        "/v1/batches",
        "listBatches",
        "OpenAI",
        "List the batches, the newest first",
        {200: Reply("A page of them.", BatchPage)},
        errors=(InvalidRequest,),
        query=BatchQuery,
    ),
    Operation(
        "get",
        "/v1/batches/{batch_id}",
        "getBatch",
        "OpenAI",
        "Show a batch",
        {200: Reply("The batch as it is now.", Batch)},
        errors=(NotFound,),
    ),
    Operation(
        "post",
        "/v1/batches/{batch_id}/cancel",
        "cancelBatch",
        "OpenAI",
        "Cancel a batch",
        {200: Reply("It ends once its running requests have.", Batch)},
        errors=(NotFound, AlreadyFinished),
        description="Cancelling again is no error.",
    ),
)
OPERATIONS = (*FILES, *BATCHES)
