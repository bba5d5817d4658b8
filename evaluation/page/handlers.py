"""Handlers of the page: generation with previews, settings and errors.

Shapes: see `evaluation.prompting`.
"""

import contextlib
import dataclasses
import os
import queue
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

import numpy as np

from EasyLM.errors import UserError, prefix_errors
from evaluation.page import strip
from evaluation.page.files import ExampleFiles, decode, read_file
from evaluation.page.models import Models
from evaluation.page.pictures import enlarged, enlarged_side, save_png
from evaluation.prompting import GenerationSettings
from evaluation.serving.batch_worker import Answer, Prompt
from evaluation.serving.batcher import ClosedError, QueueFullError
from evaluation.serving.engine import Engine
from evaluation.serving.progress import Preview
from evaluation.serving.request_errors import RequestError
from evaluation.serving.workload import TooMuchWorkError
from tokenizer.media import images

_MAX_HISTORY = 12  # strips of one visitor
_GAP = 8  # white pixels between an image and its reconstruction
Captioned = list[tuple[Any, str]]  # (image or path, caption) for a gallery


class Update(NamedTuple):
    """New values of the components below the button, in this order. `skip()`: a component keeps its value.

    The last one is the (path, caption) of the strip, for `remember`.
    """

    status: str
    answers: Any
    reconstructions: Any
    download: Any
    strip: Any


@dataclasses.dataclass(frozen=True, eq=False)
class PromptFiles:
    """The prompt that a visitor gave.

    Attributes:
      images: what the model receives, uint8 [P,S,S,3].
      shown: the images in the size of the page's pictures, uint8 [P,s,s,3]; see `enlarged_side`.
      truth: the images that follow, uint8 [F,S,S,3]; None: they are not known.
    """

    images: np.ndarray
    shown: np.ndarray
    truth: np.ndarray | None

    @classmethod
    def read(cls, paths: Sequence[str], size: int, examples: ExampleFiles) -> "PromptFiles":
        """Reads files, which visitors uploaded or the page wrote.

        Raises:
          UserError: naming the slot; see `read_file` and `decode`.
        """
        labels = strip.prompt_labels(len(paths), examples.is_analogy)
        pixels, shown = [], []
        for path, label in zip(paths, labels, strict=True):
            with prefix_errors(label):
                file = read_file(path, examples.folder)
                pixels.append(decode(file, size))
                shown.append(decode(file, enlarged_side(size)))
        return cls(np.stack(pixels), np.stack(shown), examples.truth_after(np.stack(pixels)))


@dataclasses.dataclass(frozen=True)
class Request:
    """What a visitor asks for.

    Attributes:
      model: name of the model.
      files: paths of the prompt's images.
      settings: how to generate.
      client: address of the visitor.
    """

    model: str
    files: Sequence[str]
    settings: GenerationSettings
    client: str = ""


def generate(models: Models, examples: ExampleFiles, request: Request) -> Iterator[Update]:
    """Yields updates with the prompt's reconstruction, with previews, and with the answer.

    Args:
      models: has the model that generates.
      examples: the examples of the tab.
      request: what the visitor asks for.

    Raises:
      gradio.Error: for the visitor, if the prompt is wrong or the engine refuses it.
    """
    import gradio

    no_download, skip = gradio.DownloadButton(interactive=False), gradio.skip()
    previews: queue.SimpleQueue[Preview | None] = queue.SimpleQueue()
    settings, client = request.settings, request.client
    with errors_for_visitors(), contextlib.ExitStack() as request_end:
        info = models.info(request.model)
        info.check(len(request.files), settings)
        prompt = PromptFiles.read(request.files, info.resolution, examples)
        # From here on, the request is right: only such a request replaces the model of other visitors.
        if not models.is_loaded(request.model):
            yield Update(f"Loading {request.model} instead of another model ...", [], [], no_download, skip)
        engine = request_end.enter_context(models.engine(request.model))
        request_end.enter_context(engine.admitted(client, settings))
        begin = time.monotonic()
        reconstructing = engine.reconstruct(Prompt(images=images.to_float32(prompt.images)), client)
        request_end.callback(reconstructing.cancel)  # the visitor may have closed the page
        yield Update(first_status(engine), [], [], no_download, skip)
        reconstruction = reconstructing.result()
        future = engine.generate(Prompt(tokens=reconstruction.tokens), settings, previews.put, client)
        request_end.callback(future.cancel)
        future.add_done_callback(lambda _: previews.put(None))
        beside = _beside(prompt, reconstruction.images, examples.is_analogy)
        yield Update(first_status(engine), skip, beside, skip, skip)
        while (preview := previews.get()) is not None:
            status = f"Drawing: {preview.done} of {preview.total} tokens"
            yield Update(status, _captioned(preview.images, prompt.truth), skip, skip, skip)
        answer = future.result()
        seconds = time.monotonic() - begin
        status = (
            f"Done: {answer.tokens[0].size} tokens a candidate in {seconds:.1f} s, "
            f"{answer.tokens.size / seconds:.0f} tokens/s in all"
        )
        path = _save_strip(prompt, answer, request, examples)
        download = gradio.DownloadButton(value=path, interactive=True)
        yield Update(status, _captioned(answer.images, prompt.truth), skip, download, (path, _description(request)))


def remember(strip: tuple[str, str], history: Sequence[tuple[str, str]]) -> tuple[list, list]:
    """Returns a visitor's strips, the latest first, with a new one: as a value and for the gallery.

    Call it with the history after an answer, not with that before: another tab may have added a strip meanwhile.
    """
    strips = [strip, *(item for item in history if os.path.exists(item[0]))][:_MAX_HISTORY]
    return strips, strips


@contextlib.contextmanager
def errors_for_visitors() -> Iterator[None]:
    """Shows the errors that a visitor can understand on the page."""
    try:
        yield
    except (UserError, RequestError, QueueFullError, TooMuchWorkError, ClosedError) as error:
        raise visitor_error(str(error)) from None
    except CancelledError:
        raise visitor_error("this answer was stopped: the page closes, or another model takes its place") from None


def first_status(engine: Engine) -> str:
    """Returns the status before the first preview."""
    if engine.state == "failed":
        return f"Warming up failed ({engine.warm_up_error}), generating without it ..."
    return "Compiling for the first image ..." if engine.state == "warming up" else "Reading the prompt ..."


def visitor_error(message: str) -> Exception:
    """Returns an error that the page shows until the visitor closes it or draws, as a sentence. It is not logged."""
    import gradio

    begins_with_word = re.match("[a-z]+ ", message)  # not with the name of a file or a setting
    sentence = message[0].upper() + message[1:] if begins_with_word else message
    return gradio.Error(sentence, duration=None, print_exception=False)


def generation_settings(initial: GenerationSettings, values: Sequence[Any]) -> GenerationSettings:
    """Returns the settings of the page's fields: candidates, temperature, top-p, seed, new frames.

    Raises:
      gradio.Error: naming the field that is out of range.
    """
    num_candidates, temperature, top_p, seed, num_new_images = values
    with errors_for_visitors():
        return GenerationSettings(
            num_candidates=int(num_candidates),
            temperature=float(temperature),
            top_p=float(top_p),
            seed=int(seed),
            num_new_images=int(num_new_images),
            top_k=initial.top_k,
            context_images=initial.context_images,
        )


def _description(request: Request) -> str:
    """Returns the model and the settings of an answer, from which it can be drawn again."""
    settings = request.settings
    return f"{request.model}: seed {settings.seed}, temperature {settings.temperature:g}, top-p {settings.top_p:g}"


def _captioned(images_CFSS3: np.ndarray, truth: np.ndarray | None) -> Captioned:
    """Returns the truth, if it is known, and the generated images, enlarged, each with its caption."""
    rows = strip.answer_rows(images.to_uint8(images_CFSS3), truth)
    return [(enlarged(image), label) for row in rows for label, image in row]


def _beside(prompt: PromptFiles, reconstructed: np.ndarray, is_analogy: bool) -> Captioned:
    """Returns pictures of each image of a prompt and its reconstruction."""
    labels = strip.prompt_labels(len(prompt.shown), is_analogy)
    pictures = []
    for image, other, label in zip(prompt.shown, images.to_uint8(reconstructed), labels, strict=True):
        gap = np.full((len(image), _GAP, 3), 255, np.uint8)
        pictures.append((np.concatenate([image, gap, enlarged(other)], axis=1), label))
    return pictures


def _save_strip(prompt: PromptFiles, answer: Answer, request: Request, examples: ExampleFiles) -> str:
    """Writes prompt, truth and answer as one labelled PNG file, and returns its path."""
    answer_rows = strip.answer_rows(images.to_uint8(answer.images), prompt.truth)
    enlarged_rows = [[(label, enlarged(image)) for label, image in row] for row in answer_rows]
    rows = [*strip.prompt_rows(prompt.shown, examples.is_analogy), *enlarged_rows]
    return save_png(strip.labelled_strip(rows, _description(request)), examples.folder, "answer")
