"""Handlers of the page: generation with previews, settings and errors.

Shapes: see `evaluation.prompting`.
"""

import contextlib
import os
import pathlib
import queue
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from EasyLM.errors import UserError
from evaluation.prompting import GenerationSettings
from evaluation.serving import uploads
from evaluation.serving.batch_worker import Prompt
from evaluation.serving.batcher import ClosedError, QueueFullError
from evaluation.serving.engine import Engine
from evaluation.serving.limits import Limits
from evaluation.serving.page_files import enlarged, save_answer
from evaluation.serving.progress import Preview
from evaluation.serving.request_errors import RequestError
from evaluation.serving.workload import TooMuchWorkError
from tokenizer.media import images

LIMITS = Limits()


def generate(
    engine: Engine, files: Sequence[str], settings: GenerationSettings, folder: pathlib.Path, client: str = ""
) -> Iterator[tuple[str, list, Any]]:
    """Yields (status, captioned images, download button) while the tokens are generated, then for the answer."""
    import gradio

    no_download = gradio.DownloadButton(interactive=False)
    previews: queue.SimpleQueue[Preview | None] = queue.SimpleQueue()
    with contextlib.ExitStack() as request_end:
        try:
            request_end.enter_context(engine.admitted(client, settings))
            engine.check_length(len(files))
            prompt = Prompt(images=uploads.decode_images(_contents(files), engine.resolution, LIMITS))
            future = engine.generate(prompt, settings, previews.put, client)
        except (UserError, RequestError, QueueFullError, TooMuchWorkError, ClosedError) as error:
            raise visitor_error(str(error)) from None
        begin = time.monotonic()
        request_end.callback(future.cancel)  # the visitor may have closed the page
        future.add_done_callback(lambda _: previews.put(None))
        yield first_status(engine), [], no_download
        while (preview := previews.get()) is not None:
            yield f"Drawing: {preview.done} of {preview.total} tokens", _captioned(preview.images), no_download
        answer = future.result()
    seconds = time.monotonic() - begin
    path = save_answer(answer.images, folder)
    yield (
        f"Done: {answer.tokens[0].size} tokens a candidate in {seconds:.1f} s, "
        f"{answer.tokens.size / seconds:.0f} tokens/s in all",
        _captioned(answer.images),
        gradio.DownloadButton(value=str(path), interactive=True),
    )


def _contents(files: Sequence[str]) -> list[bytes]:
    """Reads uploaded files, and marks them as used: files that nobody uses are removed after an hour.

    Raises:
      UserError: if a file has been removed.
    """
    try:
        for file in files:
            os.utime(file)
        return [pathlib.Path(file).read_bytes() for file in files]
    except FileNotFoundError:
        raise UserError("an image is no longer stored: add it again") from None


def first_status(engine: Engine) -> str:
    """Returns the status before the first preview."""
    if engine.state == "failed":
        return f"Warming up failed ({engine.warm_up_error}), generating without it ..."
    return "Compiling for the first image ..." if engine.state == "warming up" else "Reading the prompt ..."


def visitor_error(message: str) -> Exception:
    """Returns an error that the page shows until the visitor closes it. Gradio does not log it."""
    import gradio

    return gradio.Error(message, duration=None, print_exception=False)


def generation_settings(initial: GenerationSettings, values: Sequence[Any]) -> GenerationSettings:
    """Returns the settings of the page's fields: candidates, temperature, top-p, seed, new frames.

    Raises:
      gradio.Error: naming the field that is out of range.
    """
    num_candidates, temperature, top_p, seed, num_new_images = values
    try:
        return GenerationSettings(
            num_candidates=int(num_candidates),
            temperature=float(temperature),
            top_p=float(top_p),
            seed=int(seed or 0),
            num_new_images=int(num_new_images),
            top_k=initial.top_k,
            context_images=initial.context_images,
        )
    except UserError as error:
        raise visitor_error(str(error)) from None


def _captioned(images_CFSS3: np.ndarray) -> list[tuple[np.ndarray, str]]:
    num_new_images = images_CFSS3.shape[1]
    return [
        (enlarged(image), f"{c + 1}" if num_new_images == 1 else f"{c + 1}: frame {f + 1}")
        for c, row in enumerate(images.to_uint8(images_CFSS3))
        for f, image in enumerate(row)
    ]
