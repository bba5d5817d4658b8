"""Requests and responses of the HTTP service as pydantic models, and their schemas.

The models are the OpenAPI schema of JSON bodies; `form_schema` describes forms, whose images are files.
"""

import dataclasses
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, create_model

from EasyLM.errors import UserError
from evaluation.prompting import GenerationSettings
from evaluation.serving.uploads import FORMATS

# Lists are bounded by `bounded`. Their validation stops at the first error.
_FIRST_ERROR = Field(fail_fast=True)
ImageFile = Annotated[bytes, WithJsonSchema({"type": "string", "contentEncoding": "base64"})]
ImageFiles = Annotated[list[ImageFile], _FIRST_ERROR]
TokenRow = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], _FIRST_ERROR]
Tokens = Annotated[list[TokenRow], _FIRST_ERROR]
IMAGE_FIELDS, TOKEN_FIELDS = ("pictures", "targets"), ("tokens", "target_tokens")
MAX_JSON_FIELDS = 64  # more keys than any valid JSON body has
IMAGES = (
    f"{', '.join(FORMATS)} files, in order: base64 in JSON, or one field with this name per file in a form. Each is "
    "resized to the tokenizer's resolution without keeping its aspect ratio."
)
TOKENS = "Alternative to pictures, in JSON only: the token ids of each, as `/tokenize` returns them."


@dataclasses.dataclass(frozen=True)
class BodySizes:
    """Largest sizes of the lists of a body.

    Attributes:
      images: image files in a field.
      prompt_images: images in a field of tokens.
      tokens_per_image: tokens of an image.
    """

    images: int
    prompt_images: int
    tokens_per_image: int

    @property
    def values(self) -> int:
        """More commas and brackets than any valid JSON body has."""
        return 2 * (self.images + self.prompt_images * (self.tokens_per_image + 2)) + MAX_JSON_FIELDS


class PromptRequest(BaseModel):
    """A prompt: images in order. An analogy prompt: example, answer, example, answer, ..., query."""

    model_config = ConfigDict(val_json_bytes="base64", extra="forbid")
    pictures: ImageFiles | None = Field(None, description=f"The prompt. {IMAGES}")


class GenerateRequest(PromptRequest):
    """A prompt, and the settings of generation."""

    tokens: Tokens | None = Field(None, description=TOKENS)
    # `GenerationSettings` checks the ranges: its errors name the value.
    n_new_frames: int = Field(
        1, description="Images to generate, one after the other.", json_schema_extra={"minimum": 1}
    )
    n_candidates: int = Field(1, description="Samples for the prompt.", json_schema_extra={"minimum": 1})
    context_frames: int = Field(
        16,
        description="Images that the model attends to, the generated one included.",
        json_schema_extra={"minimum": 2},
    )
    temperature: float = Field(
        1.0,
        description="Sampling temperature; 0 takes the most likely token.",
        json_schema_extra={"minimum": 0},
    )
    top_k: int = Field(
        0, description="Sample from the k most likely tokens; 0: from all.", json_schema_extra={"minimum": 0}
    )
    top_p: float = Field(
        1.0,
        description="Sample from the most likely tokens that together have this probability; 1: from all.",
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 1},
    )
    seed: int = Field(
        0,
        description="Seed of the sampling. The images depend only on the prompt, the settings and the seed.",
        json_schema_extra={"minimum": 0, "maximum": 2**31 - 1},
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
    targets: ImageFiles | None = Field(None, description=f"The images after the prompt. {IMAGES}")
    target_tokens: Tokens | None = Field(None, description="Alternative to targets, in JSON only: their token ids.")


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
    Other lengths and other values of n_candidates or n_new_frames are compiled at their first request.
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


def bounded(model: type[Model], sizes: BodySizes) -> type[Model]:
    """Returns the model of a request with bounds of its lists, which the schema states too."""
    row = Annotated[TokenRow, Field(max_length=sizes.tokens_per_image)]
    types: dict[str, Any] = {
        **dict.fromkeys(IMAGE_FIELDS, Annotated[ImageFiles, Field(max_length=sizes.images)]),
        **dict.fromkeys(TOKEN_FIELDS, Annotated[list[row], _FIRST_ERROR, Field(max_length=sizes.prompt_images)]),
    }
    fields: dict[str, Any] = {
        name: (types[name] | None, Field(None, description=field.description))
        for name, field in model.model_fields.items()
        if name in types
    }
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, **fields)


def form_schema(model: type[PromptRequest]) -> dict[str, Any]:
    """Returns the JSON schema of a request as a form: images are required and are files; tokens are not accepted."""
    schema = model.model_json_schema()
    properties = {}
    for name, field in schema["properties"].items():
        if name in TOKEN_FIELDS:
            continue
        # In JSON, null stands for an omitted field. A form omits it.
        (kind,) = [kind for kind in field.pop("anyOf", [{}]) if kind.get("type") != "null"]
        if field.get("default", ...) is None:
            del field["default"]
        files = {"items": {"type": "string", "format": "binary"}, "minItems": 1} if name in IMAGE_FIELDS else {}
        properties[name] = {**kind, **field, **files}
    required = [name for name in IMAGE_FIELDS if name in properties]
    return {**schema, "properties": properties, "required": required}
