"""Refusals, in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A request is refused, or its answer ended early.

    Args:
        status: HTTP status.
        message: fault, for a person.
        param: field of the request that is wrong.
        code: the same for a program.
        retry_after: seconds to wait before the next try.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def no_model(name: str, names: list[str]) -> ApiError:
    """Return the refusal of a model that is not served."""
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return ApiError(404, f"model {name!r} is not served; models: {shown}", "model", "model_not_found")
