"""What the service takes and gives: bodies as JSON (pictures in base64) or as forms (pictures as files), checked."""

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from EasyLM.errors import UserError
from evaluation.serving.engine import Settings
from evaluation.serving.uploads import FORMATS, Limits, Refused

_ERRORS_SHOWN = 5
_FIELDS = 32  # more than any form has that is no picture

Tokens = list[list[Annotated[int, Field(ge=0, lt=2**31)]]]
PICTURES = (
    f"{', '.join(FORMATS)} files, in order: base64 in JSON, or the field repeated with a file each in a form. Each is "
    "resized to the tokenizer's resolution, its aspect not kept."
)
TOKENS = "In place of pictures: the token ids of each, as `/tokenize` gives them."


class PromptRequest(BaseModel):
    """A prompt: pictures in order. For an analogy: example, answer, example, answer, ..., query."""

    model_config = ConfigDict(val_json_bytes="base64", extra="forbid")
    pictures: list[bytes] | None = Field(None, description=f"The prompt. {PICTURES}")


class GenerateRequest(PromptRequest):
    """A prompt, and how the pictures that follow it are drawn."""

    tokens: Tokens | None = Field(None, description=TOKENS)
    n_new_frames: int = Field(1, description="Pictures to draw, one after the other.")
    n_candidates: int = Field(1, description="Alternatives to draw, which share the prompt.")
    context_frames: int = Field(16, description="Pictures that the model sees, the one that it draws included.")
    temperature: float = Field(1.0, description="0 takes the likeliest token each time.")
    top_k: int = Field(0, description="Draw from so many likeliest tokens only; 0: from all.")
    top_p: float = Field(1.0, description="Draw from the likeliest tokens whose probabilities add up to this; 1: all.")
    seed: int = Field(0, description="The same seed and prompt give the same pictures, whatever else is computed.")
    output: Literal["json", "png", "stream"] | None = Field(
        None,
        description="`png`: one picture, a row for each candidate, a column for each new picture. `stream`: "
        "server-sent events while the pictures come. Left out: what the Accept header asks for (image/png, "
        "text/event-stream), or JSON.",
    )

    @property
    def settings(self) -> Settings:
        return Settings(**self.model_dump(include=set(Settings.__dataclass_fields__)))


class PerplexityRequest(PromptRequest):
    """A prompt, and pictures that may follow it."""

    tokens: Tokens | None = Field(None, description=TOKENS)
    targets: list[bytes] | None = Field(None, description=f"What follows the prompt. {PICTURES}")
    target_tokens: Tokens | None = Field(None, description="In place of targets: their token ids.")


class GenerateResponse(BaseModel):
    """The pictures that follow."""

    pictures: list[list[str]] = Field(description="PNG files in base64: of each candidate its new pictures.")
    tokens: list[list[list[int]]] = Field(description="Their token ids.")
    batch: int = Field(description="Requests that were computed together with this one, itself included.")


class PerplexityResponse(BaseModel):
    """How well the model foresees the targets: exp of the mean negative log-likelihood, in nats, of their tokens."""

    perplexity: float = Field(description="Over all tokens of the targets.")
    perplexities: list[float] = Field(description="Of each target, given the prompt and the targets before it.")


class TokenizeResponse(BaseModel):
    """Token ids of each picture, row by row from the top left."""

    tokens: list[list[int]]


class Problem(BaseModel):
    """Why a request was not answered."""

    code: str = Field(description="For programs: invalid, body_too_large, queue_full, ...")
    message: str = Field(description="For people: names the field, its value and what is allowed.")


class ErrorResponse(BaseModel):
    """The body of every answer that is not 200."""

    error: Problem


class ReadyResponse(BaseModel):
    """Whether what `--warm_up` names is compiled, and what the model takes.

    Compiled are prompts of those lengths, drawn from with the settings of a request that gives none, and measured with
    one target. The first request of another length, with other n_candidates or n_new_frames, with temperature 0, top_k
    or top_p waits for its own compilation.
    """

    ready: bool
    state: Literal["warming up", "ready", "failed", "stopping"]
    resolution: int = Field(description="The side in pixels of the pictures that are drawn.")
    max_pictures: int = Field(description="Pictures of the longest prompt.")
    tokens_per_image: int


def tokens_array(tokens: Tokens, name: str) -> np.ndarray:
    """Token ids [P,N].

    Raises:
      UserError: if the pictures have different numbers of tokens.
    """
    if len({len(row) for row in tokens}) > 1:
        raise UserError(f"{name}: the pictures have different numbers of tokens")
    return np.asarray(tokens, np.int32)


async def read(request, kind: type[PromptRequest], limits: Limits) -> PromptRequest:
    """The body of a request (Starlette's), as a `kind`.

    Raises:
      Refused: naming the fields that are wrong.
    """
    from starlette.concurrency import run_in_threadpool

    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if media == "application/json":
            return await run_in_threadpool(kind.model_validate_json, await request.body())
        if media == "multipart/form-data":
            return kind.model_validate(await _form(request, kind, limits))
    except ValidationError as error:
        raise Refused(422, "invalid", _reasons(error)) from None
    raise Refused(
        415, "unsupported_media_type", f"content-type {media!r}: send application/json or multipart/form-data"
    )


async def _form(request, kind: type[PromptRequest], limits: Limits) -> dict:
    """The fields of a form: files of one name as a list, anything else as text."""
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException

    fields = {}
    try:
        # Files are counted as pictures, where the limit has its own answer; here only so far that a form ends.
        async with request.form(max_files=2 * limits.pictures + 1, max_fields=_FIELDS, max_part_size=2**20) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    fields.setdefault(name, []).append(await value.read())
                elif name in fields:
                    raise Refused(422, "invalid", f"{name}: given twice")
                else:
                    fields[name] = value
    except HTTPException as error:
        raise Refused(422, "invalid_form", str(error.detail)) from None
    except AttributeError:
        raise Refused(422, "invalid", "a field is given both as a file and as text") from None
    return fields


def _reasons(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False, include_context=False)
    reasons = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" if one["loc"] else one["msg"] for one in found]
    rest = len(reasons) - _ERRORS_SHOWN
    return "; ".join(reasons[:_ERRORS_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")
