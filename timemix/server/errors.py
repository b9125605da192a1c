"""Errors of the API, in the form of OpenAI's errors."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer with an error status.

    Args:
        status: HTTP status, 400 to 599.
        message: One sentence: the problem, then a solution.
        param: Field of the request that is wrong; None: no single field.
        code: Word by which a program recognizes the error; None: none.
        headers: Headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body(), self.status, self.headers)


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """Answer a request whose handler raised an ApiError."""
    assert isinstance(error, ApiError)
    return error.response()
