"""HTTP error responses: `RequestError`, and the conversion of other exceptions to it."""

from EasyLM.errors import UserError, one_line
from evaluation.serving.batcher import ClosedError, QueueFullError
from evaluation.serving.workload import TooMuchWorkError

_RETRY_SECONDS = 5  # for a client with open requests


class RequestError(Exception):
    """An error that the service sends as an HTTP response.

    Attributes:
      status: the HTTP status.
      code: machine-readable reason.
      message: human-readable reason.
      retry_after: seconds until the client may try again; None: no such header.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    @property
    def body(self) -> dict:
        return {"error": {"code": self.code, "message": one_line(self.message)}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        if self.status == 400:
            headers["connection"] = "close"  # where a malformed request ends is not known
        return headers if self.retry_after is None else headers | {"retry-after": str(self.retry_after)}


def to_request_error(error: Exception) -> RequestError:
    """Converts the exception of a failed request."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UserError):
        return RequestError(422, "invalid", str(error))
    if isinstance(error, QueueFullError):
        return RequestError(429, "queue_full", str(error), error.retry_after)
    if isinstance(error, TooMuchWorkError):
        return RequestError(429, "too_much_work", str(error), _RETRY_SECONDS)
    if isinstance(error, ClosedError):
        return RequestError(503, "stopping", str(error), 10)
    return RequestError(500, "internal", "internal error; the reason is in the log of the service")
