"""Reads the body of a request: JSON with images in base64, or a form with image files.

Bodies are parsed in a few threads, outside the event loop. Counts and lengths are checked before any object is made
for a value, so that the memory is a small multiple of the body's size, and a body of wrong values is refused at once.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from evaluation.serving.protocol import IMAGE_FIELDS, MAX_JSON_FIELDS, TOKEN_FIELDS, BodySizes, Model
from evaluation.serving.request_errors import RequestError

if TYPE_CHECKING:
    from anyio import CapacityLimiter
    from starlette.requests import Request

_MAX_ERRORS_NAMED = 5
_MAX_ERROR_TEXT = 200  # characters; the name of a field can be as long as the body
_MAX_PART_HEADER = 4096  # bytes of the header of a part of a form
_MAX_PART_TEXT = 1024  # bytes of a field that is not a file
_MAX_BOUNDARY = 256  # bytes


async def read_request(request: "Request", model: type[Model], sizes: BodySizes, threads: "CapacityLimiter") -> Model:
    """Reads the body of a request.

    Args:
      request: the request.
      model: the bounded model of the body.
      sizes: the bounds of the model.
      threads: limits the number of threads that parse.

    Raises:
      RequestError: naming the fields that are wrong.
    """
    from anyio import to_thread

    for name in request.query_params:
        raise RequestError(422, "invalid", f"query parameter {name!r}: not read; send all fields in the body")
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in ("application/json", "multipart/form-data"):
        raise RequestError(
            415, "unsupported_media_type", f"content-type {media_type!r}: send application/json or multipart/form-data"
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise RequestError(415, "unsupported_encoding", f"content-encoding {encoding!r}: send the body uncompressed")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    if not body:
        raise RequestError(422, "invalid", "the body is empty: send the images")

    def parse() -> Model:
        try:
            if media_type == "application/json":
                return _parse_json(body, model, sizes)
            return model.model_validate(parse_form(body, content_type, 2 * sizes.images + len(model.model_fields)))
        except ValidationError as error:
            raise _request_error(error) from None

    return await to_thread.run_sync(parse, limiter=threads)


def _parse_json(body: bytearray, model: type[Model], sizes: BodySizes) -> Model:
    # A valid body has no comma, colon or bracket inside a string: these counts are the numbers of its values and keys.
    num_values = sum(body.count(mark) for mark in (b",", b"[", b"{"))
    if num_values > sizes.values:
        raise RequestError(422, "invalid", f"the JSON has more values than any valid request, which has {sizes.values}")
    num_keys = body.count(b":")
    if num_keys > MAX_JSON_FIELDS:
        raise RequestError(422, "invalid", f"the JSON has more fields than any valid request: {num_keys}")
    request = model.model_validate_json(body)
    if num_keys > len(request.model_fields_set):
        raise RequestError(422, "invalid", "the JSON has a field twice")
    return request


def parse_form(body: bytearray, content_type: str, max_parts: int) -> dict[str, Any]:
    """Returns the fields of a multipart form: files as a list of bytes per name, other fields as text (RFC 7578).

    The time is linear in the size of the body, and its memory twice that size.

    Raises:
      RequestError: if the form is malformed or truncated, or has too many parts.
    """
    files: dict[str, list[bytes]] = {}
    texts: dict[str, str] = {}
    for name, is_file, content in _parts(body, _boundary(content_type), max_parts):
        if name in texts or (name in files and not is_file):
            raise RequestError(422, "invalid", f"{name}: given twice, or both as a file and as text")
        if is_file:
            files.setdefault(name, []).append(bytes(content))
        elif name in (*IMAGE_FIELDS, *TOKEN_FIELDS):
            raise RequestError(422, "invalid", f"{name}: a form sends images as files; send tokens and base64 as JSON")
        elif len(content) > _MAX_PART_TEXT:
            raise RequestError(422, "invalid", f"{name}: longer than {_MAX_PART_TEXT} bytes")
        else:
            texts[name] = content.decode(errors="replace")
    return files | texts


def _boundary(content_type: str) -> bytes:
    from python_multipart.multipart import parse_options_header

    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not 0 < len(boundary) <= _MAX_BOUNDARY:
        raise _invalid_form(f"the content-type must name a boundary of 1..{_MAX_BOUNDARY} bytes")
    return boundary


def _parts(body: bytearray, boundary: bytes, max_parts: int) -> Iterator[tuple[str, bool, bytearray]]:
    """Yields name, whether it is a file, and content of each part."""
    delimiter = b"\r\n--" + boundary
    begin = -2 if body.startswith(delimiter[2:]) else body.find(delimiter)
    if begin == -1:
        raise _invalid_form("the body does not have the boundary of its content-type")
    begin += len(delimiter)
    number = 0
    while body[begin : begin + 2] != b"--":
        number += 1
        if number > max_parts:
            raise _invalid_form(f"more parts than any valid request, which has {max_parts}")
        line_end = body.find(b"\r\n", begin, begin + _MAX_PART_HEADER)  # spaces may follow the delimiter
        header_end = body.find(b"\r\n\r\n", begin, begin + _MAX_PART_HEADER)
        if header_end < 0 or body[begin:line_end].strip(b" \t"):
            raise _invalid_form(f"part {number} is truncated, or its header is longer than {_MAX_PART_HEADER} bytes")
        end = body.find(delimiter, header_end + 2)
        if end < 0:
            raise _invalid_form("the body ends before its closing boundary: it is truncated")
        yield *_part_name(body[line_end:header_end], number), body[header_end + 4 : end]
        begin = end + len(delimiter)


def _part_name(header: bytearray, number: int) -> tuple[str, bool]:
    """Returns the name of a part, and whether it is a file."""
    from python_multipart.multipart import parse_options_header

    for line in header.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition":
            kind, options = parse_options_header(bytes(value.strip()))
            if kind == b"form-data" and b"name" in options:
                return options[b"name"].decode(errors="replace"), b"filename" in options
    raise _invalid_form(f"part {number} has no name: it needs the header Content-Disposition: form-data; name=...")


def _invalid_form(reason: str) -> RequestError:
    return RequestError(422, "invalid_form", f"the form is malformed: {reason}")


def _request_error(error: ValidationError) -> RequestError:
    """Names the first wrong fields."""
    details = error.errors(include_url=False, include_input=False)
    for detail in details:
        if detail["type"] == "too_long" and detail["loc"][0] in IMAGE_FIELDS:
            return RequestError(413, "too_many_pictures", _reason(detail))
    num_unnamed = len(details) - _MAX_ERRORS_NAMED
    more = f"; and {num_unnamed} more" if num_unnamed > 0 else ""
    return RequestError(422, "invalid", "; ".join(map(_reason, details[:_MAX_ERRORS_NAMED])) + more)


def _reason(detail: Any) -> str:
    field = ".".join(map(str, detail["loc"]))
    message = detail["msg"]
    if detail["type"] == "bytes_invalid_encoding":
        message = f"not base64 ({detail['ctx']['encoding_error']}): no line breaks, and no prefix such as data:"
    if detail["type"] == "too_long":
        count, most = detail["ctx"]["actual_length"], detail["ctx"]["max_length"]
        unit = "images" if len(detail["loc"]) == 1 else "tokens"
        message = f"{count or 'too many'} {unit}: at most {most}"
    return f"{field[:_MAX_ERROR_TEXT]}: {message[:_MAX_ERROR_TEXT]}" if field else message[:_MAX_ERROR_TEXT]
