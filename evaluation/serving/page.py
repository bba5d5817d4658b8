"""The layout of the page: one tab for analogy prompts, one for sequential prompts (gradio)."""

import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from evaluation.prompting import GenerationSettings
from evaluation.serving import page_examples, page_files, page_handlers
from evaluation.serving.engine import Engine

if TYPE_CHECKING:
    import gradio

INITIAL_SETTINGS = GenerationSettings(num_candidates=4, temperature=1.0, top_p=0.9)
CSS = ".grid-wrap.fixed-height { min-height: 0 !important; }"  # makes galleries as high as their images
_MAX_CANDIDATES, _MAX_FRAMES, _MAX_SHOTS = 8, 8, 7
# Order of the images of an analogy on its sheet: images in the first row, annotations in the second.
_ANALOGY_ORDER = [
    *range(0, 2 * page_examples.NUM_SHOTS + 1, 2),
    *range(1, 2 * page_examples.NUM_SHOTS, 2),
]
_INTRODUCTION = """# Large Vision Model
Show the model what you want, in pictures; it draws what follows. Nothing else tells it what the task is."""


def build_page(engine: Engine, folder: pathlib.Path) -> "gradio.Blocks":
    """Returns the page. Writes its examples and answers to `folder`."""
    import gradio

    with gradio.Blocks(title="Large Vision Model", analytics_enabled=False) as page:
        gradio.Markdown(_INTRODUCTION)
        if engine.max_prompt_images > 2:
            with gradio.Tab("Analogy"):
                _analogy_tab(engine, folder)
        with gradio.Tab("Sequence"):
            _sequence_tab(engine, folder)
    return page


def _analogy_tab(engine: Engine, folder: pathlib.Path) -> None:
    """Builds the tab of analogy prompts: shots and a query. The model generates the query's annotation."""
    import gradio

    max_shots = min(_MAX_SHOTS, (engine.max_prompt_images - 1) // 2)
    initial_shots = min(page_examples.NUM_SHOTS, max_shots)
    examples = page_examples.analogies(engine.resolution)
    sheets = page_files.save_example_sheets(examples, _ANALOGY_ORDER, folder, "analogy")
    gallery = _example_gallery(sheets, "analogy")
    slots, columns = [], []
    with gradio.Row():
        for i in range(max_shots):
            with gradio.Column(visible=i < initial_shots, min_width=120) as column:
                slots += [image_slot(f"Example {i + 1}"), image_slot(f"Answer {i + 1}")]
            columns.append(column)
        with gradio.Column(min_width=120):
            slots.append(image_slot("Query"))
            # gradio refuses a slider from 1 to 1.
            num_shots = gradio.Slider(1, max(2, max_shots), initial_shots, step=1, label="Pairs", visible=max_shots > 1)
    fields, button = _settings_row("analogy", with_frames=False)

    def select_example(event: gradio.SelectData) -> list:
        files = page_files.save_example(examples[event.index], folder, f"analogy_{event.index}")[-2 * max_shots - 1 :]
        empty = [None] * (2 * max_shots + 1 - len(files))
        return [len(files) // 2, *files[:-1], *empty, files[-1]]

    def answer(request: gradio.Request, count: int, *values: Any) -> Iterator[tuple]:
        files = [*values[: 2 * count], values[2 * max_shots]]
        if None in files:
            raise page_handlers.visitor_error("Add an image to every slot, or choose fewer pairs.")
        settings = page_handlers.generation_settings(INITIAL_SETTINGS, values[2 * max_shots + 1 :])
        yield from page_handlers.generate(engine, files, settings, folder, client_of(request))

    def show_columns(count: int) -> list:
        return [gradio.Column(visible=i < count) for i in range(max_shots)]

    num_shots.change(show_columns, num_shots, columns, api_visibility="private")
    gallery.select(select_example, None, [num_shots, *slots], api_visibility="private")
    button.click(answer, [num_shots, *slots, *fields], _outputs("analogy"), api_visibility="private")


def _sequence_tab(engine: Engine, folder: pathlib.Path) -> None:
    """Builds the tab of sequential prompts: frames in order. The model generates the next frames."""
    import gradio

    examples = page_examples.sequences(engine.resolution)
    sheets = page_files.save_example_sheets(examples, range(page_examples.NUM_FRAMES), folder, "sequence")
    gallery = _example_gallery(sheets, "sequence")
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
    fields, button = _settings_row("sequence", with_frames=True)

    def select_example(event: gradio.SelectData) -> list[str]:
        return page_files.save_example(examples[event.index], folder, f"sequence_{event.index}")

    def answer(request: gradio.Request, uploaded: list | None, *values: Any) -> Iterator[tuple]:
        if not uploaded:
            raise page_handlers.visitor_error("Add at least one frame.")
        files = [path for path, _ in uploaded][-engine.max_prompt_images :]
        settings = page_handlers.generation_settings(INITIAL_SETTINGS, values)
        yield from page_handlers.generate(engine, files, settings, folder, client_of(request))

    gallery.select(select_example, None, frames, api_visibility="private")
    button.click(answer, [frames, *fields], _outputs("sequence"), api_visibility="private")


def client_of(request: Any) -> str:
    """Returns the address of the visitor who sent a gradio request."""
    return request.client.host if request.client else ""


def image_slot(label: str) -> "gradio.Image":
    """Returns a field for one image. Its value is the path of the uploaded file."""
    import gradio

    slot = gradio.Image(
        label=label,
        type="filepath",
        format="png",
        sources=["upload", "clipboard"],
        height=150,
        buttons=[],
        elem_id=label.lower().replace(" ", "_"),
    )
    # `uploads.decode_images` needs the file itself: gradio's `preprocess` decodes files of any size, and loses
    # transparency and 16-bit gray. A subclass would make gradio write a .pyi file beside this one.
    slot.preprocess = lambda payload: payload and payload.path
    return slot


def _settings_row(tab: str, with_frames: bool) -> tuple[list, "gradio.Button"]:
    """Returns the fields that `page_handlers.generation_settings` reads, in this order, and the button."""
    import gradio

    initial = INITIAL_SETTINGS
    with gradio.Row():
        fields = [
            gradio.Slider(1, _MAX_CANDIDATES, initial.num_candidates, step=1, label="Candidates", min_width=120),
            gradio.Slider(0, 2, initial.temperature, step=0.05, label="Temperature", min_width=120),
            gradio.Slider(0.05, 1, initial.top_p, step=0.05, label="Top-p", min_width=120),
            gradio.Number(initial.seed, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, min_width=120),
            gradio.Slider(
                1, _MAX_FRAMES, initial.num_new_images, step=1, label="New frames", min_width=120, visible=with_frames
            ),
        ]
    return fields, gradio.Button("Draw", variant="primary", elem_id=f"draw_{tab}")


def _outputs(tab: str) -> list:
    """Returns the components that `page_handlers.generate` updates."""
    import gradio

    return [
        gradio.Markdown("", elem_id=f"status_{tab}"),
        gradio.Gallery(
            label="The model's answers",
            format="png",
            columns=4,
            rows=1,
            height="auto",
            object_fit="contain",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id=f"answers_{tab}",
        ),
        gradio.DownloadButton("Download all as PNG", interactive=False, size="sm", elem_id=f"download_{tab}"),
    ]


def _example_gallery(sheets: list[tuple[str, str]], tab: str) -> "gradio.Gallery":
    import gradio

    return gradio.Gallery(
        sheets,
        label="Examples: click one",
        columns=5,
        rows=1,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id=f"examples_{tab}",
    )
