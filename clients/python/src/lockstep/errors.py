"""An `Error` is a refusal or a failure of a call, with the details that let a program act on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "lockstep"
DETAILS = "grpc-status-details-bin"


class Error(Exception):
    """Why a call failed. README.md of the repository has the table of reasons."""

    reason: str
    """The stable name to compare: `OVERLOADED`, `MODEL_NOT_FOUND`; the code's name where no Lockstep service spoke."""
    code: grpc.StatusCode
    """The gRPC code."""
    violations: dict[str, str]
    """What is wrong with which field, by its path in the contract: `sampling.stop[2]`."""
    retry_after: float | None
    """How long to wait before another try, where one makes sense. Unit: seconds."""

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode,
        reason: str | None = None,
        violations: dict[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason or code.name
        self.violations = violations or {}
        self.retry_after = retry_after

    def __str__(self) -> str:
        wrong = "".join(f"\n  {path}: {what}" for path, what in self.violations.items())
        return f"{self.reason}: {self.args[0]}{wrong}"


class _Failure(Protocol):
    """What every `grpc.RpcError` of a call has, though its type does not say so."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def from_rpc(failure: grpc.RpcError) -> Error:
    """Reads the `google.rpc` details that came with a failure. A proxy may have sent anything in their place."""
    call = cast(_Failure, failure)
    error = Error(call.details() or "", call.code())
    try:
        _read_details(call, error)
    except DecodeError:
        pass
    return error


def _read_details(call: _Failure, error: Error) -> None:
    packed = next((value for key, value in call.trailing_metadata() or () if key == DETAILS), b"")
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(cast(bytes, packed)).details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            error.reason = info.reason
        elif detail.Unpack(bad):
            error.violations = {field.field: field.description for field in bad.field_violations}
        elif detail.Unpack(retry):
            error.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
