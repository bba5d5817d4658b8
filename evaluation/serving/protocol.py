"""Requests and responses of the HTTP service as pydantic models, and the parser of requests.

A body is JSON (images in base64) or a form (images as files). The models are the OpenAPI schema.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from EasyLM.errors import UserError
from evaluation.prompting import GenerationSettings
from evaluation.serving.limits import Limits
from evaluation.serving.request_errors import RequestError
from evaluation.serving.uploads import FORMATS

if TYPE_CHECKING:
    from starlette.requests import Request

_MAX_ERRORS_NAMED = 5
_MAX_FORM_FIELDS = 32  # fields of a form that are not images

Tokens = list[list[Annotated[int, Field(ge=0, lt=2**31)]]]
IMAGES = (
    f"{', '.join(FORMATS)} files, in order: base64 in JSON, or one field with this name per file in a form. Each is "
    "resized to the tokenizer's resolution without keeping its aspect ratio."
)
TOKENS = "Alternative to pictures: the token ids of each, as `/tokenize` returns them."


class PromptRequest(BaseModel):
    """A prompt: images in order. An analogy prompt: example, answer, example, answer, ..., query."""

    model_config = ConfigDict(val_json_bytes="base64", extra="forbid")
    pictures: list[bytes] | None = Field(None, description=f"The prompt. {IMAGES}")


class GenerateRequest(PromptRequest):
    """A prompt, and the settings of generation."""

    tokens: Tokens | None = Field(None, description=TOKENS)
    n_new_frames: int = Field(1, description="Images to generate, one after the other.")
    n_candidates: int = Field(1, description="Samples for the prompt.")
    context_frames: int = Field(16, description="Images that the model attends to, the generated one included.")
    temperature: float = Field(1.0, description="Sampling temperature; 0 takes the most likely token.")
    top_k: int = Field(0, description="Sample from the k most likely tokens; 0: from all.")
    top_p: float = Field(
        1.0, description="Sample from the most likely tokens that together have this probability; 1: from all."
    )
    seed: int = Field(
        0, description="Seed of the sampling. The images depend only on the prompt, the settings and the seed."
    )
    output: Literal["json", "png", "stream"] | None = Field(
        None,
        description="`png`: one image, a row per candidate, a column per new image. `stream`: server-sent events while "
        "the images are generated. If omitted, the Accept header decides (image/png, text/event-stream); else JSON.",
    )

    @property
    def settings(self) -> GenerationSettings:
        """Raises UserError for a setting that is out of range."""
        return GenerationSettings.from_user(self.model_dump(exclude={"pictures", "tokens", "output"}))


class PerplexityRequest(PromptRequest):
    """A prompt, and the images after it whose perplexity is measured."""

    tokens: Tokens | None = Field(None, description=TOKENS)
    targets: list[bytes] | None = Field(None, description=f"The images after the prompt. {IMAGES}")
    target_tokens: Tokens | None = Field(None, description="Alternative to targets: their token ids.")


class GenerateResponse(BaseModel):
    """The generated images."""

    pictures: list[list[str]] = Field(description="PNG files in base64: the new images of each candidate.")
    tokens: list[list[list[int]]] = Field(description="Their token ids.")
    batch: int = Field(description="Number of requests in the batch that computed this one.")


class PerplexityResponse(BaseModel):
    """Perplexity of the targets: exp of the mean negative log-likelihood, in nats, of their tokens."""

    perplexity: float = Field(description="Over all tokens of the targets.")
    perplexities: list[float] = Field(description="Of each target, given the prompt and the targets before it.")


class TokenizeResponse(BaseModel):
    """Token ids of each image, row by row from the top left."""

    tokens: list[list[int]]


class ErrorDetail(BaseModel):
    """The reason of an error."""

    code: str = Field(description="Machine-readable reason: invalid, body_too_large, queue_full, ...")
    message: str = Field(description="Human-readable reason: the field, its value and the valid values.")


class ErrorResponse(BaseModel):
    """The body of every response with a status other than 200."""

    error: ErrorDetail


class ReadyResponse(BaseModel):
    """Whether the programs of `--warm_up` are compiled, and the sizes that the model accepts.

    These programs are generation with default settings, and perplexity of one target, for prompts of those lengths.
    Other lengths, other values of n_candidates or n_new_frames, temperature 0, top_k and top_p are compiled at their
    first request.
    """

    ready: bool
    state: Literal["warming up", "ready", "failed", "stopping"]
    resolution: int = Field(description="Side, in pixels, of the generated images.")
    max_pictures: int = Field(description="Images of the longest prompt.")
    tokens_per_image: int


Model = TypeVar("Model", bound=PromptRequest)


def tokens_array(tokens: Tokens, name: str) -> np.ndarray:
    """Returns token ids [P,N].

    Raises:
      UserError: if there is no image, or the images have different numbers of tokens.
    """
    if not tokens:
        raise UserError(f"{name}: give at least one image")
    if len({len(row) for row in tokens}) > 1:
        raise UserError(f"{name}: the images have different numbers of tokens")
    return np.asarray(tokens, np.int32)


async def read_request(request: "Request", model: type[Model], limits: Limits) -> Model:
    """Reads the body of a request.

    Raises:
      RequestError: naming the fields that are wrong.
    """
    from starlette.concurrency import run_in_threadpool

    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if media_type == "application/json":
            return await run_in_threadpool(model.model_validate_json, await request.body())
        if media_type == "multipart/form-data":
            return model.model_validate(await _read_form(request, limits))
    except ValidationError as error:
        raise RequestError(422, "invalid", _error_summary(error)) from None
    raise RequestError(
        415, "unsupported_media_type", f"content-type {media_type!r}: send application/json or multipart/form-data"
    )


async def _read_form(request: "Request", limits: Limits) -> dict[str, Any]:
    """Returns the fields of a form: files as one list per name, other fields as text."""
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException

    files: dict[str, list[bytes]] = {}
    texts: dict[str, str] = {}
    # This limit only bounds the parsing. `uploads` checks the exact number of images, with its own error.
    max_files = 2 * limits.images + 1
    try:
        async with request.form(max_files=max_files, max_fields=_MAX_FORM_FIELDS, max_part_size=2**20) as form:
            for name, value in form.multi_items():
                if name in texts or (name in files and not isinstance(value, UploadFile)):
                    raise RequestError(422, "invalid", f"{name}: given twice, or both as a file and as text")
                if isinstance(value, UploadFile):
                    files.setdefault(name, []).append(await value.read())
                else:
                    texts[name] = value
    except HTTPException as error:
        raise RequestError(422, "invalid_form", str(error.detail)) from None
    return files | texts


def _error_summary(error: ValidationError) -> str:
    details = error.errors(include_url=False, include_input=False, include_context=False)
    reasons = [
        f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" if detail["loc"] else detail["msg"]
        for detail in details
    ]
    num_unnamed = len(reasons) - _MAX_ERRORS_NAMED
    return "; ".join(reasons[:_MAX_ERRORS_NAMED]) + (f"; and {num_unnamed} more" if num_unnamed > 0 else "")
