"""The two tabs of the page: analogy prompts and sequential prompts (gradio)."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from evaluation.page import brush, examples, fields, handlers
from evaluation.page.fields import INITIAL_SETTINGS, History
from evaluation.page.files import ExampleFiles, check_stored
from evaluation.page.models import Models
from evaluation.page.video import evenly_spaced_frames

_MAX_SHOTS = 7


@dataclasses.dataclass(frozen=True)
class Page:
    """What both tabs share: the models, the field that chooses one, the folder of files, and the history."""

    models: Models
    model: Any
    folder: pathlib.Path
    history: History

    def example_files(self, make: Callable[[int], Sequence[examples.Example]], name: str) -> dict[str, ExampleFiles]:
        """Returns the examples of each model. Those of models with images of one size are the same."""
        sizes = {info.resolution for info in self.models.infos.values()}
        by_size = {size: ExampleFiles(make(size), self.folder, f"{name}_{size}") for size in sizes}
        return {info.name: by_size[info.resolution] for info in self.models.infos.values()}

    def request(self, request: Any, model: str, files: Sequence[str], values: Sequence) -> handlers.Request:
        """Returns what a visitor asks for. `request`: that of gradio. `values`: those of `fields.settings_row`."""
        settings = handlers.generation_settings(INITIAL_SETTINGS, values)
        return handlers.Request(model, files, settings, request.client.host if request.client else "")

    def add_follow_ups(self, draw: Any, outputs: Sequence) -> None:
        """Adds what follows a draw: its strip in the history; after an error, no status of an earlier draw."""
        self.history.add_after(draw, outputs[-1])
        draw.failure(lambda: "", None, outputs[0], show_progress="hidden", api_visibility="private")


def analogy_tab(page: Page) -> None:
    """Builds the tab of analogy prompts: shots and a query. The model generates the query's annotation."""
    import gradio

    infos = page.models.infos
    most = max(info.max_prompt_images for info in infos.values())
    max_shots = min(_MAX_SHOTS, (most - 1) // 2)
    initial_shots = min(examples.NUM_SHOTS, max_shots)
    by_model = page.example_files(examples.analogies, "analogy")
    gallery = fields.example_gallery(next(iter(by_model.values())).sheets, "analogy")
    slots, columns = [], []
    with gradio.Row():
        for i in range(max_shots):
            with gradio.Column(visible=i < initial_shots, min_width=120) as column:
                slots += [fields.image_slot(f"Example {i + 1}"), fields.image_slot(f"Answer {i + 1}")]
            columns.append(column)
        with gradio.Column(min_width=120):
            slots.append(fields.image_slot("Query"))
            # gradio refuses a slider from 1 to 1.
            num_shots = fields.checked(
                gradio.Slider(1, max(2, max_shots), initial_shots, step=1, label="Pairs", visible=max_shots > 1)
            )
    brush.add_brush(slots, lambda model: infos[model].resolution, page.model, page.folder)
    settings_fields, button = fields.settings_row("analogy", with_frames=False)

    def select_example(model: str, event: gradio.SelectData) -> list:
        shots = min(max_shots, (infos[model].max_prompt_images - 1) // 2)
        files = by_model[model].save(event.index)[-2 * shots - 1 :]
        empty = [None] * (2 * max_shots + 1 - len(files))
        return [max(len(files) // 2, 1), *files[:-1], *empty, files[-1]]

    def answer(request: gradio.Request, model: str, count: int, *values: Any) -> Iterator[tuple]:
        files = [*values[: 2 * count], values[2 * max_shots]]
        if None in files:
            raise handlers.visitor_error("Add an image to every slot, or choose fewer pairs.")
        asked = page.request(request, model, files, values[2 * max_shots + 1 :])
        yield from handlers.generate(page.models, by_model[model], asked)

    def show_columns(count: int) -> list:
        return [gradio.Column(visible=i < count) for i in range(max_shots)]

    inputs = [page.model, num_shots, *slots, *settings_fields]
    num_shots.change(show_columns, num_shots, columns, api_visibility="private")
    gallery.select(select_example, page.model, [num_shots, *slots], api_visibility="private")
    page.model.change(lambda model: by_model[model].sheets, page.model, gallery, api_visibility="private")
    outputs = fields.outputs("analogy")
    draw = button.click(answer, inputs, outputs, show_progress_on=outputs[:1], api_visibility="private")
    page.add_follow_ups(draw, outputs)


def sequence_tab(page: Page) -> None:
    """Builds the tab of sequential prompts: frames in order. The model generates the next frames."""
    import gradio

    infos, by_model = page.models.infos, page.example_files(examples.sequences, "sequence")
    gallery = fields.example_gallery(next(iter(by_model.values())).sheets, "sequence")
    frames = gradio.Gallery(
        label="Frames, in order: drop images here",
        type="filepath",
        format="png",
        file_types=["image"],
        sources=["upload"],
        columns=8,
        height="auto",
        object_fit="contain",
        interactive=True,
        elem_id="frames",
    )
    video = gradio.UploadButton(
        f"Take {examples.NUM_FRAMES} frames of a video, evenly from beginning to end",
        file_types=["video"],
        size="md",
        elem_id="video",
    )
    video.preprocess = lambda payload: payload and payload.path
    settings_fields, button = fields.settings_row("sequence", with_frames=True)

    def take_frames(model: str, path: str) -> list[str]:
        info = infos[model]
        count = min(examples.NUM_FRAMES, info.max_prompt_images)
        with handlers.errors_for_visitors():
            check_stored(path, page.folder)
            return evenly_spaced_frames(path, count, info.resolution, page.folder)

    def select_example(model: str, event: gradio.SelectData) -> list[str]:
        return by_model[model].save(event.index)

    def answer(request: gradio.Request, model: str, uploaded: list | None, *values: Any) -> Iterator[tuple]:
        if not uploaded:
            raise handlers.visitor_error("Add at least one frame.")
        files = [path for path, _ in uploaded][-infos[model].max_prompt_images :]
        asked = page.request(request, model, files, values)
        yield from handlers.generate(page.models, by_model[model], asked)

    inputs = [page.model, frames, *settings_fields]
    gallery.select(select_example, page.model, frames, api_visibility="private")
    # Reading a video takes a core for up to a minute.
    video.upload(take_frames, [page.model, video], frames, api_visibility="private", concurrency_limit=1)
    page.model.change(lambda model: by_model[model].sheets, page.model, gallery, api_visibility="private")
    outputs = fields.outputs("sequence")
    draw = button.click(answer, inputs, outputs, show_progress_on=outputs[:1], api_visibility="private")
    page.add_follow_ups(draw, outputs)
