"""`Refused`: a request answered with an HTTP error. Converts exceptions to it."""

from EasyLM.errors import UserError
from evaluation.serving.batcher import ClosedError, QueueFullError


class Refused(Exception):  # noqa: N818, a response rather than a failure
    """A request that is answered with an HTTP error.

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
        return {"error": {"code": self.code, "message": self.message}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        return headers if self.retry_after is None else headers | {"retry-after": str(self.retry_after)}


def refusal_of(error: Exception) -> Refused:
    """Returns the HTTP error of a request that failed with this exception."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UserError):
        return Refused(422, "invalid", str(error))
    if isinstance(error, QueueFullError):
        return Refused(429, "queue_full", str(error), error.retry_after)
    if isinstance(error, ClosedError):
        return Refused(503, "stopping", str(error), 10)
    return Refused(500, "internal", "internal error; the reason is in the log of the service")
