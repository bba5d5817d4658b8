"""The HTTP service: an engine, and the limits that keep strangers from harming it."""

import asyncio
import hmac
from functools import partial

from EasyLM.errors import UserError
from evaluation.serving import engine as engines
from evaluation.serving import protocol, responses, uploads
from evaluation.serving.batcher import ClosedError, QueueFullError
from evaluation.serving.engine import Engine, Prompt
from evaluation.serving.limits import Guard
from evaluation.serving.uploads import Limits, Refused

_UNPACKERS = 4  # threads that unpack pictures, so that their memory is bounded
_TITLE = "Large Vision Model"
_DESCRIPTION = """Prompt a Large Vision Model with pictures; it draws what follows.

*An analogy*: example, answer, example, answer, ..., query. The model draws the query's answer.

*A sequence*: frames in order. The model draws the next ones.

Pictures come as files of a form (`curl -F pictures=@a.png -F pictures=@b.png`) or in base64 (JSON). Requests that
arrive together are computed together. Every answer other than 200 is `{"error": {"code": ..., "message": ...}}`.
"""


def make_app(engine: Engine, limits: Limits | None = None, token: str = ""):
    """The FastAPI application. `token`: what a request must bear (`Authorization: Bearer TOKEN`); empty: nothing."""
    from anyio import CapacityLimiter, to_thread
    from fastapi import Depends, Request
    from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from fastapi_offline import FastAPIOffline  # the page of the OpenAPI schema, without scripts from elsewhere

    limits = limits or Limits()
    app = FastAPIOffline(title=_TITLE, description=_DESCRIPTION, version="1", redoc_url=None)
    app.add_middleware(Guard, limits=limits)
    unpackers = CapacityLimiter(_UNPACKERS)
    _answer_errors(app)

    bearer = Depends(HTTPBearer(auto_error=False))

    def authorised(credentials: HTTPAuthorizationCredentials | None = bearer):
        given = credentials.credentials if credentials else ""
        if token and not hmac.compare_digest(given.encode(), token.encode()):
            raise Refused(401, "unauthorized", "send the header `Authorization: Bearer TOKEN`")

    async def prompt_of(pictures, tokens, name: str, tokens_name: str) -> Prompt:
        if (pictures is None) == (tokens is None):
            raise Refused(422, "invalid", f"give either {name} or {tokens_name}")
        if tokens is not None:
            return Prompt(tokens=protocol.tokens_array(tokens, tokens_name))
        if not pictures:
            raise Refused(422, "invalid", f"{name}: give at least one picture")
        decode = partial(uploads.decode, pictures, engine.resolution, limits, name)
        return Prompt(pictures=await to_thread.run_sync(decode, limiter=unpackers))

    def documented(path: str, kind, response, **content):
        return app.post(
            path,
            dependencies=[Depends(authorised)],
            openapi_extra=_request_body(kind),
            responses={200: {"model": response, "content": content}, **_errors_documented()},
        )

    @app.get("/", include_in_schema=False)
    async def index():
        return RedirectResponse("docs")

    @app.get("/ready", responses={200: {"model": protocol.ReadyResponse}, 503: {"model": protocol.ReadyResponse}})
    async def ready():
        """200 once what `--warm_up` names is compiled, 503 before that and while the service stops. Needs no token.

        A request that is like none of that (`ReadyResponse` says what is) is answered too; the first one takes longer.
        """
        body = {
            "ready": engine.state == "ready",
            "state": engine.state,
            "resolution": engine.resolution,
            "max_pictures": engine.max_pictures,
            "tokens_per_image": engine.tokens_per_image,
        }
        return JSONResponse(body, 200 if body["ready"] else 503)

    @documented(
        "/generate", protocol.GenerateRequest, protocol.GenerateResponse, **{"image/png": {}, "text/event-stream": {}}
    )
    async def generate(request: Request):
        """Draws the pictures that follow a prompt.

        A stream has the events `partial` (`done` of `total` tokens; `pictures` so far, as in the answer, with what is
        not drawn yet in gray), `answer` (as the JSON answer) and, if it fails on the way, `error`.
        """
        asked = await protocol.read(request, protocol.GenerateRequest, limits)
        prompt = await prompt_of(asked.pictures, asked.tokens, "pictures", "tokens")
        output = asked.output or _accepted(request.headers.get("accept", ""))
        if output == "stream":
            # Here, not in the stream: what is refused is answered with its status.
            news = responses.News(asyncio.get_running_loop())
            future = engine.generate(prompt, asked.settings, news.tell)
            future.add_done_callback(lambda _: news.tell(None))
            return StreamingResponse(responses.events(future, news), media_type="text/event-stream")
        answer = await _result(engine.generate(prompt, asked.settings), request)
        if output == "png":
            return Response(await to_thread.run_sync(responses.sheet, answer.pictures), media_type="image/png")
        return JSONResponse(await to_thread.run_sync(responses.answer_body, answer))

    @documented("/perplexity", protocol.PerplexityRequest, protocol.PerplexityResponse)
    async def perplexity(request: Request):
        """Measures how well the model foresees given pictures after a prompt."""
        asked = await protocol.read(request, protocol.PerplexityRequest, limits)
        both = {"pictures": asked.pictures or [], "targets": asked.targets or []}
        await to_thread.run_sync(uploads.check, both, limits, limiter=unpackers)
        prompt = await prompt_of(asked.pictures, asked.tokens, "pictures", "tokens")
        target = await prompt_of(asked.targets, asked.target_tokens, "targets", "target_tokens")
        found = await _result(engine.log_likelihoods(prompt, target), request)
        each = [engines.perplexity(row) for row in found]
        return JSONResponse({"perplexity": engines.perplexity(found), "perplexities": each})

    @documented("/tokenize", protocol.PromptRequest, protocol.TokenizeResponse)
    async def tokenize(request: Request):
        """The tokens of pictures, as prompts take them."""
        asked = await protocol.read(request, protocol.PromptRequest, limits)
        prompt = await prompt_of(asked.pictures, None, "pictures", "tokens")
        tokens = await _result(engine.tokenize(prompt), request)
        return JSONResponse({"tokens": tokens.tolist()})

    return app


def _answer_errors(app) -> None:
    """Gives every error the same body."""
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def answer(request, error):
        refused = responses.refusal_of(error)
        return JSONResponse(refused.body, refused.status, headers=refused.headers)

    def answer_http(request, error):  # no such path, wrong method
        body = {"error": {"code": f"http_{error.status_code}", "message": str(error.detail)}}
        return JSONResponse(body, error.status_code, headers=error.headers)

    for kind in (Refused, UserError, QueueFullError, ClosedError, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, answer_http)


def _request_body(kind) -> dict:
    schema = kind.model_json_schema()
    content = {media: {"schema": schema} for media in ("application/json", "multipart/form-data")}
    return {"requestBody": {"required": True, "content": content}}


def _errors_documented() -> dict:
    reasons = {
        401: "The token is missing or wrong.",
        408: "The body came too slowly.",
        413: "The body, the number of pictures or their pixels are above the limit.",
        415: "The body is neither JSON nor a form.",
        422: "A field or a picture is wrong; the message names it.",
        429: "Too many requests wait; the header Retry-After says when to come again.",
        500: "A fault of the service.",
        503: "The service is stopping, or too many requests are open.",
    }
    return {status: {"model": protocol.ErrorResponse, "description": reason} for status, reason in reasons.items()}


def _accepted(header: str) -> str:
    """The first kind of answer in an Accept header that the service has."""
    kinds = {"image/png": "png", "text/event-stream": "stream"}
    for part in header.split(","):
        media = part.partition(";")[0].strip().lower()
        if media in ("application/json", *kinds):
            return kinds.get(media, "json")
    return "json"


async def _result(future, request):
    """What the engine makes of a request; if the client leaves, the engine need not."""
    waiting = asyncio.ensure_future(asyncio.wrap_future(future))
    leaving = asyncio.ensure_future(_until_left(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.cancelled():
            raise ClosedError(responses.UNFINISHED)
        if waiting.done():
            return waiting.result()
        raise Refused(499, "client_left", "the client left")  # nobody reads it
    finally:
        waiting.cancel()
        leaving.cancel()


async def _until_left(request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
