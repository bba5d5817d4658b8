"""The FastAPI application: routes, authorization, error responses and the OpenAPI schema."""

import hmac
import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from EasyLM.errors import UserError
from evaluation.serving import protocol
from evaluation.serving.batcher import ClosedError, QueueFullError
from evaluation.serving.endpoints import Endpoints
from evaluation.serving.engine import Engine
from evaluation.serving.header_check import ANY_HOST, HeaderCheck
from evaluation.serving.limits import Guard, Limits
from evaluation.serving.request_errors import RequestError, to_request_error
from evaluation.serving.workload import TooMuchWorkError

if TYPE_CHECKING:
    from fastapi import FastAPI

_TITLE = "Large Vision Model"
_DESCRIPTION = """Prompt a Large Vision Model with images; it generates the images that follow.

*An analogy prompt*: example, answer, example, answer, ..., query. The model generates the query's answer.

*A sequential prompt*: frames in order. The model generates the next frames.

Images are files of a form (`curl -F pictures=@a.png -F pictures=@b.png`) or base64 (JSON). Requests that arrive
at the same time are computed in one batch. Every response with a status other than 200 is
`{"error": {"code": ..., "message": ...}}`.
"""
_ERRORS = {
    400: "The headers contradict each other.",
    401: "The token is missing or wrong.",
    403: "The host is not one of `--allowed_hosts`, or a page of another origin sent the request.",
    408: "The body arrived too slowly.",
    413: "The body, the number of images or their pixels exceed the limit.",
    415: "The body is neither JSON nor a form.",
    422: "A field or an image is wrong; the message names it.",
    429: "The queue is full, or the client has too much work outstanding. Try again after the seconds of the header "
    "Retry-After.",
    500: "An error of the service.",
    503: "The service is stopping, or too many requests are open.",
}


def make_app(engine: Engine, limits: Limits | None = None, token: str = "", allowed_hosts: str = ANY_HOST) -> "FastAPI":
    """Returns the application.

    Args:
      engine: answers the requests.
      limits: limits of the requests.
      token: bearer token that POST requests must send; empty: no authorization.
      allowed_hosts: see `HeaderCheck`.
    """
    from fastapi.responses import RedirectResponse
    from fastapi_offline import FastAPIOffline  # its schema page needs no external scripts

    limits = limits or Limits()
    app = FastAPIOffline(title=_TITLE, description=_DESCRIPTION, version="1", redoc_url=None)
    app.add_middleware(HeaderCheck, allowed_hosts=allowed_hosts)
    app.add_middleware(Guard, limits=limits)  # runs first
    _add_error_handlers(app)
    app.add_api_route("/", lambda: RedirectResponse("docs"), include_in_schema=False)
    endpoints = Endpoints(engine, limits)
    ready_model = {"model": protocol.ReadyResponse}
    _add_route(app, "GET", "/ready", endpoints.ready, responses={200: ready_model, 503: ready_model})
    media_types: dict[str, dict] = {"image/png": {}, "text/event-stream": {}}
    post = _PostRoutes(app, token)
    post.add("/generate", endpoints.generate, endpoints.generate_model, protocol.GenerateResponse, media_types)
    post.add("/perplexity", endpoints.perplexity, endpoints.perplexity_model, protocol.PerplexityResponse)
    post.add("/tokenize", endpoints.tokenize, endpoints.tokenize_model, protocol.TokenizeResponse)
    return app


class _PostRoutes:
    """Adds endpoints that need the token, with their request and response models in the schema."""

    def __init__(self, app: "FastAPI", token: str):
        from fastapi import Depends
        from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

        bearer = Depends(HTTPBearer(auto_error=False))

        def authorize(credentials: HTTPAuthorizationCredentials | None = bearer) -> None:
            sent = credentials.credentials if credentials else ""
            if token and not hmac.compare_digest(sent.encode(), token.encode()):
                raise RequestError(401, "unauthorized", "send the header `Authorization: Bearer TOKEN`")

        self._app, self._authorize = app, Depends(authorize)

    def add(
        self,
        path: str,
        endpoint: Callable[..., Awaitable],
        request_model: type[protocol.PromptRequest],
        response_model: type,
        media_types: dict[str, dict] | None = None,
    ) -> None:
        errors = {status: {"model": protocol.ErrorResponse, "description": text} for status, text in _ERRORS.items()}
        schemas = {
            "application/json": request_model.model_json_schema(),
            "multipart/form-data": protocol.form_schema(request_model),
        }
        body = {"required": True, "content": {name: {"schema": schema} for name, schema in schemas.items()}}
        _add_route(
            self._app,
            "POST",
            path,
            endpoint,
            dependencies=[self._authorize],
            openapi_extra={"requestBody": body},
            responses={200: {"model": response_model, "content": media_types or {}}, **errors},
        )


def _add_route(app: "FastAPI", method: str, path: str, endpoint: Callable[..., Awaitable], **options: Any) -> None:
    """Adds a route. FastAPI cannot resolve the endpoint's own annotations: their imports are for type checks only."""
    from fastapi import Request

    async def route(request: Request) -> Any:
        return await endpoint(request)

    description = inspect.getdoc(endpoint)
    app.add_api_route(
        path,
        route,
        methods=[method],
        name=getattr(endpoint, "__name__", path),
        description=description,
        response_model=None,
        **options,
    )


def _add_error_handlers(app: "FastAPI") -> None:
    """Makes every error an `ErrorResponse`."""
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def answer(request: Request, error: Exception) -> JSONResponse:
        request_error = to_request_error(error)
        return JSONResponse(request_error.body, request_error.status, headers=request_error.headers)

    def answer_http(request: Request, error: Any) -> JSONResponse:  # unknown path, wrong method
        body = {"error": {"code": f"http_{error.status_code}", "message": str(error.detail)}}
        return JSONResponse(body, error.status_code, headers=error.headers)

    for kind in (RequestError, UserError, QueueFullError, TooMuchWorkError, ClosedError, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, answer_http)
