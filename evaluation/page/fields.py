"""The components that both tabs have: slots, examples, settings, and what shows an answer."""

import dataclasses
import secrets
from typing import TYPE_CHECKING, Any

from evaluation.page.examples import NUM_TRUE_FRAMES
from evaluation.page.handlers import Update, remember, visitor_error
from evaluation.prompting import GenerationSettings

if TYPE_CHECKING:
    import gradio

INITIAL_SETTINGS = GenerationSettings(num_candidates=4, temperature=1.0, top_p=0.9)
_MAX_CANDIDATES, _MAX_FRAMES = 8, NUM_TRUE_FRAMES
# Errors of an earlier draw would stay beside the next answer.
_CLOSE_ERRORS = "() => document.querySelectorAll('.toast-close').forEach(button => button.click())"


@dataclasses.dataclass(frozen=True)
class History:
    """The strips of a visitor, as a value and as a gallery."""

    state: Any
    gallery: Any

    def add_after(self, draw: Any, strip: "gradio.State") -> None:
        """Adds the strip after each draw without an error. One at a time, so that no strip of two draws is lost."""
        inputs, outputs = [strip, self.state], [self.state, self.gallery]
        options = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 1}
        draw.success(remember, inputs, outputs, concurrency_id="history", **options)


def image_slot(label: str) -> "gradio.Image":
    """Returns a field for one image. Its value is the path of the uploaded file."""
    import gradio

    slot = gradio.Image(
        label=label,
        type="filepath",
        format="png",
        sources=["upload", "clipboard"],
        height=180,
        placeholder="Add an image",
        buttons=[],
        elem_classes="slot",
        elem_id=label.lower().replace(" ", "_"),
    )
    # `uploads.decode_images` needs the file itself, because gradio's `preprocess` decodes files of any size, and loses
    # transparency and 16-bit gray. For a subclass, gradio would write a .pyi file beside this one.
    slot.preprocess = lambda payload: payload and payload.path
    return slot


def settings_row(tab: str, with_frames: bool) -> tuple[list, "gradio.Button"]:
    """Returns the fields that `handlers.generation_settings` reads, in this order, and the button."""
    import gradio

    initial = INITIAL_SETTINGS
    with gradio.Row():
        candidates, temperature, top_p, frames = (
            _slider("Candidates", "answers to draw", 1, _MAX_CANDIDATES, initial.num_candidates),
            _slider("Temperature", "0: the likeliest; higher: varied", 0, 2, initial.temperature, 0.05),
            _slider("Top-p", "1: all choices; lower: likely ones", 0.05, 1, initial.top_p, 0.05),
            _slider("New frames", "of each candidate", 1, _MAX_FRAMES, initial.num_new_images, visible=with_frames),
        )
        with gradio.Column(min_width=120):
            seed = checked(
                gradio.Number(
                    initial.seed,
                    label="Seed",
                    info="the same seed draws the same",
                    precision=0,
                    minimum=0,
                    maximum=2**31 - 1,
                )
            )
            random = gradio.Button("Random seed", size="md", elem_id=f"random_{tab}")
    random.click(lambda: secrets.randbelow(2**31), None, seed, api_visibility="private")
    button = gradio.Button("Draw", variant="primary", elem_id=f"draw_{tab}")
    button.click(None, js=_CLOSE_ERRORS, api_visibility="private")
    return [candidates, temperature, top_p, seed, frames], button


def _slider(
    label: str, info: str, least: float, most: float, value: float, step: float = 1, visible: bool = True
) -> "gradio.Slider":
    import gradio

    return checked(gradio.Slider(least, most, value, step=step, label=label, info=info, min_width=200, visible=visible))


def checked(field: Any) -> Any:
    """Returns a slider or a number whose values are checked. The errors of gradio do not name the field.

    A visitor can empty the field; gradio would then fail without a reason.
    """

    def preprocess(value: Any) -> float:
        if not isinstance(value, int | float) or not field.minimum <= value <= field.maximum:
            raise visitor_error(f"{field.label}: must be a number from {field.minimum:g} to {field.maximum:.10g}")
        return value

    field.preprocess = preprocess
    return field


def outputs(tab: str) -> list:
    """Returns the components that `handlers.generate` updates, in the order of `handlers.Update`."""
    import gradio

    status = gradio.Markdown("", elem_id=f"status_{tab}")
    answers = _gallery("The model's answers", 5, f"answers_{tab}")
    download = gradio.DownloadButton(
        "Download prompt and answers as PNG", interactive=False, size="md", elem_id=f"download_{tab}"
    )
    reconstructions = _gallery(
        "What the model sees of your images: each image, and what its tokens keep of it", 4, f"reconstructions_{tab}"
    )
    return list(Update(status, answers, reconstructions, download, strip=gradio.State(None)))


def history() -> History:
    """Returns the history. Its gallery is shown where its `render` is called."""
    import gradio

    gallery = _gallery("History of this visit, the latest first", 3, "history", render=False)
    return History(gradio.State([]), gallery)


def _gallery(label: str, columns: int, elem_id: str, render: bool = True) -> "gradio.Gallery":
    import gradio

    return gradio.Gallery(
        label=label,
        format="png",
        columns=columns,
        rows=1,
        height="auto",
        object_fit="contain",
        fit_columns=False,
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=elem_id,
        render=render,
    )


def example_gallery(sheets: list[tuple[str, str]], tab: str) -> "gradio.Gallery":
    """Returns the gallery in which a visitor selects an example."""
    import gradio

    return gradio.Gallery(
        sheets,
        label="Examples: click one",
        columns=6,
        rows=1,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id=f"examples_{tab}",
    )
