"""Every refusal in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from skyrl_train.errors import EngineUnavailable, RequestRejected
from skyrl_train.serving.fan_out import ClientGone

CLIENT_GONE_STATUS = 499
MAX_SHOWN_CHARS = 80


class ApiError(Exception):
    """A request that is answered with an error. `param` names the field that is to blame."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param=param, code=code), status, headers=headers)


def as_api_error(exc: Exception) -> ApiError | None:
    """What an engine's error means to a client; None if it is no engine's error."""
    match exc:
        case ApiError():
            return exc
        case RequestRejected():
            return ApiError(400, str(exc))
        case EngineUnavailable():
            return ApiError(503, str(exc), code="engine_unavailable")
        case _:
            return None


def install_error_handlers(app: FastAPI) -> None:
    """Answers for everything that a route raises, and for what never reached one."""

    async def known(_: Request, exc: Exception) -> Response:
        error = as_api_error(exc)
        assert error is not None, exc
        return error_response(error.status, error.message, param=error.param, code=error.code)

    async def malformed(_: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        param, message = describe(exc.errors()[0])
        return error_response(400, message, param=param)

    async def http(_: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        return error_response(exc.status_code, str(exc.detail), headers=exc.headers)

    async def gone(_: Request, exc: Exception) -> Response:
        return Response(status_code=CLIENT_GONE_STATUS)

    async def bug(_: Request, exc: Exception) -> Response:
        # Starlette raises it again after this answer, so that the server logs the traceback.
        return error_response(500, f"internal error: {type(exc).__name__}")

    for kind in (ApiError, RequestRejected, EngineUnavailable):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(Exception, bug)


def describe(error: Mapping[str, Any]) -> tuple[str | None, str]:
    """The field and the message of one of pydantic's errors."""
    path = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        return None, f"the body is not JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
    if error["type"] == "named_field":
        path.append(error["ctx"]["field"])
    param = ".".join(path) or None
    if error["type"] == "missing":
        return param, f"{param or 'a JSON body'} is required"
    if param is None:
        return None, f"the body must be a JSON object sent as application/json: {error['msg']}"
    if error["type"] in {"named_field", "refused"}:
        return param, f"{param}: {error['msg']}"
    found = repr(error["input"])
    if len(found) > MAX_SHOWN_CHARS:
        found = found[:MAX_SHOWN_CHARS] + "..."
    return param, f"{param}: {error['msg']}, found {found}"
