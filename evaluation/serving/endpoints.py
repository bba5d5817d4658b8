"""The endpoints of the HTTP service: each reads a request, passes it to the engine and awaits the result.

Their docstrings are the descriptions in the OpenAPI schema.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from evaluation.prompting import GenerationSettings
from evaluation.serving import engine as engines
from evaluation.serving import protocol, responses, uploads
from evaluation.serving.batch_worker import Prompt
from evaluation.serving.batcher import ClosedError
from evaluation.serving.engine import Engine
from evaluation.serving.limits import Limits
from evaluation.serving.request_bodies import read_request
from evaluation.serving.request_errors import RequestError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

_DECODE_THREADS = 4  # bounds the memory of parsed bodies and of decoded images


class Endpoints:
    """The endpoints of one engine."""

    def __init__(self, engine: Engine, limits: Limits):
        from anyio import CapacityLimiter

        self._engine, self._limits = engine, limits
        self._threads = CapacityLimiter(_DECODE_THREADS)
        self._sizes = protocol.BodySizes(limits.images, engine.max_prompt_images, engine.tokens_per_image)
        self.generate_model = protocol.bounded(protocol.GenerateRequest, self._sizes)
        self.perplexity_model = protocol.bounded(protocol.PerplexityRequest, self._sizes)
        self.tokenize_model = protocol.bounded(protocol.PromptRequest, self._sizes)

    async def ready(self, request: "Request") -> "Response":
        """Returns 200 once the programs of `--warm_up` are compiled, else 503. Needs no token.

        The service also answers requests that need other programs (see `ReadyResponse`); the first one takes longer.
        """
        is_ready = self._engine.state == "ready"
        body = {
            "ready": is_ready,
            "state": self._engine.state,
            "resolution": self._engine.resolution,
            "max_pictures": self._engine.max_prompt_images,
            "tokens_per_image": self._engine.tokens_per_image,
        }
        return _json(body, 200 if is_ready else 503)

    async def generate(self, request: "Request") -> "Response":
        """Generates the images that follow a prompt.

        A stream has the events `partial` (`done` of `total` tokens; `pictures` as in the JSON response, with gray for
        pixels that are not generated yet), `answer` (the JSON response) and, if it fails after its start, `error`.
        """
        from anyio import to_thread
        from starlette.responses import Response, StreamingResponse

        body = await read_request(request, self.generate_model, self._sizes, self._threads)
        settings, output = body.settings, body.output or _accepted_output(request.headers.get("accept", ""))
        client = self._admit(request, settings)
        prompt = await self._prompt(body.pictures, body.tokens, "pictures", "tokens")
        del body  # its files
        if output == "stream":
            previews = responses.LatestPreview(asyncio.get_running_loop())
            # Submitted before the stream starts, so that an error has its own HTTP status.
            future = self._engine.generate(prompt, settings, previews.publish, client)
            future.add_done_callback(lambda _: previews.publish(None))
            return StreamingResponse(responses.events(future, previews), media_type="text/event-stream")
        answer = await _result(self._engine.generate(prompt, settings, client=client), request)
        if output == "png":
            return Response(await to_thread.run_sync(responses.png_sheet, answer.images), media_type="image/png")
        return _json(await to_thread.run_sync(responses.answer_body, answer))

    async def perplexity(self, request: "Request") -> "Response":
        """Measures the perplexity of given images after a prompt."""
        from anyio import to_thread

        body = await read_request(request, self.perplexity_model, self._sizes, self._threads)
        client = self._admit(request)
        files = {"pictures": body.pictures or [], "targets": body.targets or []}
        await to_thread.run_sync(uploads.check_images, files, self._limits, limiter=self._threads)
        prompt = await self._prompt(body.pictures, body.tokens, "pictures", "tokens")
        target = await self._prompt(body.targets, body.target_tokens, "targets", "target_tokens")
        del body  # its files
        log_p_PN = await _result(self._engine.log_likelihoods(prompt, target, client), request)
        perplexities = [engines.perplexity(log_p_N) for log_p_N in log_p_PN]
        return _json({"perplexity": engines.perplexity(log_p_PN), "perplexities": perplexities})

    async def tokenize(self, request: "Request") -> "Response":
        """Returns the tokens of images, in the form that prompts accept."""
        body = await read_request(request, self.tokenize_model, self._sizes, self._threads)
        client = self._admit(request)
        prompt = await self._prompt(body.pictures or [], None, "pictures", "tokens")
        tokens = await _result(self._engine.tokenize(prompt, client), request)
        return _json({"tokens": tokens.tolist()})

    def _admit(self, request: "Request", settings: GenerationSettings | None = None) -> str:
        """Counts the request as work of its client until its response is sent. Returns the client.

        Raises:
          TooMuchWorkError: if the client has too much work outstanding.
        """
        client = request.client.host if request.client else ""
        request.scope["request_end"].enter_context(self._engine.admitted(client, settings))
        return client

    async def _prompt(
        self, files: Sequence[bytes] | None, tokens: protocol.Tokens | None, files_name: str, tokens_name: str
    ) -> Prompt:
        """Returns the prompt of two fields. Exactly one of them must be given."""
        from anyio import to_thread

        if (files is None) == (tokens is None):
            raise RequestError(422, "invalid", f"give either {files_name} or {tokens_name}")
        if tokens is not None:
            return Prompt(tokens=protocol.tokens_array(tokens, tokens_name))
        self._engine.check_length(len(files or ()))
        decode = partial(uploads.decode_images, files or (), self._engine.resolution, self._limits, files_name)
        return Prompt(images=await to_thread.run_sync(decode, limiter=self._threads))


def _json(body: dict, status: int = 200) -> "Response":
    from starlette.responses import JSONResponse

    return JSONResponse(body, status)


def _accepted_output(accept: str) -> str:
    """Returns the first supported output of an Accept header, else JSON."""
    outputs = {"image/png": "png", "text/event-stream": "stream", "application/json": "json"}
    for part in accept.split(","):
        media_type = part.partition(";")[0].strip().lower()
        if media_type in outputs:
            return outputs[media_type]
    return "json"


async def _result(future: Future, request: "Request") -> Any:
    """Awaits the engine's result; cancels the request when its client disconnects."""
    result = asyncio.ensure_future(asyncio.wrap_future(future))
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({result, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if result.cancelled():
            raise ClosedError(responses.UNFINISHED)
        if result.done():
            return result.result()
        raise RequestError(499, "client_left", "the client disconnected")
    finally:
        result.cancel()
        disconnect.cancel()


async def _wait_for_disconnect(request: "Request") -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
