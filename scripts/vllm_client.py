"""Requests the image that follows a prompt of images from a vLLM server (docs/serve_elsewhere.md).

    python scripts/vllm_client.py --images=a.png,a_depth.png,b.png --vqgan=VQGAN_DIR --output=answer.png

The server knows token ids only. This program encodes the prompt and decodes the answers with the tokenizer. The request
is that of OpenAI's API with a field of vLLM, `return_token_ids`, so that answers come as ids and not as text. Another
field makes them consist of codes (`only_codes`).
"""

import dataclasses
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag, run
from EasyLM.storage import check_schema, expand_paths, parse_json
from EasyLM.vocab import NUM_SPECIAL_IDS
from tokenizer.formats import ImageTokenizer
from tokenizer.media import grids, images
from tokenizer.vqgan import CODEC_FLAGS, Codec

_LONGEST_LIST = 1024  # ids that one field of a request can list in vLLM's Model Runner V2, the default from 0.25 on
_SECONDS = 600  # for an answer
FLAGS = {
    "images": Flag("", "Comma list of image files, in the order of the prompt.", required=True),
    # Without a default: the server does not tell which tokenizer its model was trained with.
    "vqgan": dataclasses.replace(CODEC_FLAGS["vqgan"], default="", required=True),
    "resolution": CODEC_FLAGS["resolution"],
    "url": Flag("http://127.0.0.1:8000/v1", "Address of the server's OpenAI API.", free_text=True),  # not by fsspec
    "n_candidates": Flag(1, "Answers, which the output shows side by side.", least=1),
    "temperature": Flag(1.0, "Temperature of sampling; 0: the most likely token.", least=0),
    "special_ids": Flag(
        NUM_SPECIAL_IDS,
        f"Ids of the model after the codes; used if there are more than {_LONGEST_LIST} codes.",
        least=0,
        most=_LONGEST_LIST,
    ),
    "output": Flag("", "Image file of the answers.", required=True),
}


def main(config: ConfigDict) -> None:
    """Writes the answers of the server."""
    paths = expand_paths("images", config.images)
    images.check_output(config.output, "output")
    with prefix_errors(f"--url={config.url}"):
        served = call(config.url, "models", None, {"data": [{"id": str}]})["data"]
        if not served:
            raise UserError("the server has no model")
    codec = Codec(config.vqgan, resolution=config.resolution)
    prompt_PN = codec.encode(np.stack([images.load(path, codec.resolution) for path in paths]))
    body = request(served[0]["id"], prompt_PN, codec, config.n_candidates, config.temperature, config.special_ids)
    with prefix_errors(f"--url={config.url}"):
        codes_CN = codes(call(config.url, "completions", body, {"choices": [dict]})["choices"], codec)
    images.save(config.output, grids.grid(images.to_uint8(codec.decode(codes_CN)), len(codes_CN)))


def request(
    model: str,
    prompt_PN: np.ndarray,
    tokenizer: ImageTokenizer,
    candidates: int,
    temperature: float,
    special_ids: int,
) -> dict[str, Any]:
    """Returns the body of a request for the image that follows the tokens of P images."""
    return {
        "model": model,
        "prompt": prompt_PN.ravel().tolist(),
        "max_tokens": tokenizer.tokens_per_image,
        "n": candidates,
        "temperature": temperature,
        "return_token_ids": True,
        **only_codes(tokenizer.num_codes, special_ids),
    }


def only_codes(num_codes: int, special_ids: int) -> dict[str, Any]:
    """Returns the field of a request that excludes the ids after the codes.

    A list of all codes needs no number of special ids. A list that is too long ends vLLM's engine; then the logits of
    the special ids are lowered by 100, the most that the API allows. Relative to a code, this multiplies their
    probability by exp(-100 / temperature).
    """
    if num_codes <= _LONGEST_LIST:
        return {"allowed_token_ids": list(range(num_codes))}
    return {"logit_bias": {str(num_codes + i): -100 for i in range(special_ids)}}


def codes(choices: Sequence[Mapping[str, Any]], tokenizer: ImageTokenizer) -> np.ndarray:
    """Returns the codes of the answers, [C,N] int32.

    Raises:
      UserError: if there is no answer, or one is not an image: it has no ids, too few, or ids that are not codes.
    """
    if not choices:
        raise UserError("the reply has no answer")
    for choice in choices:
        if (ids := choice.get("token_ids")) is None:
            raise UserError("the answer has no token_ids: vLLM returns them from version 0.10.2 on")
        check_schema(ids, [int], "token_ids")
        if len(ids) != tokenizer.tokens_per_image or not all(0 <= code < tokenizer.num_codes for code in ids):
            raise UserError(
                f"the answer has {len(ids)} ids up to {max(ids, default=0)}; an image of --vqgan has "
                f"{tokenizer.tokens_per_image} codes below {tokenizer.num_codes}"
            )
    return np.array([choice["token_ids"] for choice in choices], np.int32)


def call(url: str, path: str, body: Any, schema: Any) -> Any:
    """Calls the server's API; with a body, by POST. Returns the JSON of its reply, checked with the schema.

    Raises:
      UserError: if the server cannot be reached, refuses the request, or replies something else.
    """
    data = None if body is None else json.dumps(body).encode()
    try:
        message = urllib.request.Request(f"{url.rstrip('/')}/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(message, timeout=_SECONDS) as reply:
            return parse_json(reply.read(), schema)
    except urllib.error.HTTPError as error:
        text = error.read(1000).decode(errors="replace")
        raise UserError(f"{path}: {error.code} {error.reason}: {text}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{path}: {error}") from None


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
