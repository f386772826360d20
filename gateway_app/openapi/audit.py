"""`/v1/audit`: the operations on the record."""

from __future__ import annotations

from gateway_app.api.audit import EventQuery, ExportQuery
from gateway_app.audit.export import MEDIA_TYPES
from gateway_app.openapi.answers.audit import AuditPage
from gateway_app.openapi.operation import Operation, Reply
from tasks.errors import InvalidRequest, TooManyExports

OPERATIONS = (
    Operation(
        "get",
        "/v1/audit/events",
        "listAuditEvents",
        "audit",
        "List your organization's audit events",
        {200: Reply("A page of them.", AuditPage)},
        errors=(InvalidRequest,),
        query=EventQuery,
    ),
    Operation(
        "get",
        "/v1/audit/export",
        "exportAudit",
        "audit",
        "Export your organization's audit trail, the oldest event first",
        {
            200: Reply(
                "MetaQore's trail, an event a line, or a table as CSV.",
                bytes_types=tuple(MEDIA_TYPES.values()),
                headers=("Content-Disposition",),
            )
        },
        errors=(InvalidRequest, TooManyExports),
        description="Streamed. It is whole only if the response has its end: over HTTP/1.1, the last chunk.",
        query=ExportQuery,
    ),
)
