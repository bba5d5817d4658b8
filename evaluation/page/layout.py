"""The layout of the page: the model, a tab for analogy and one for sequential prompts, and the history (gradio)."""

import pathlib
from typing import TYPE_CHECKING

from evaluation.page import fields
from evaluation.page.models import Models
from evaluation.page.tabs import Page, analogy_tab, sequence_tab

if TYPE_CHECKING:
    import gradio

CSS = """
.gradio-container { --block-info-text-color: var(--neutral-500); } /* gradio's is too light to read */
/* Galleries are as high as their images. Names stand above and below the images, not on them. */
.grid-wrap.fixed-height { min-height: 0 !important; overflow-y: auto !important; }
.block:has(> .gallery-container) > label { position: static !important; }
.caption-label { position: static !important; max-width: 100% !important; white-space: normal !important; }
.caption-label { border: none !important; }
.thumbnail-item { aspect-ratio: auto !important; height: auto !important; }
.thumbnail-item img { aspect-ratio: 1 / 1; }
[id^="examples_"] .thumbnail-item img, [id^="reconstructions_"] .thumbnail-item img { aspect-ratio: 2 / 1; }
#history .thumbnail-item img { aspect-ratio: 4 / 3; }
@media (max-width: 640px) { .grid-container { grid-template-columns: repeat(2, minmax(100px, 1fr)) !important; } }
"""
_INTRODUCTION = """# Large Vision Model
Show the model what you want, in pictures; it draws what follows. Nothing else tells it what the task is."""


def build_page(models: Models, folder: pathlib.Path) -> "gradio.Blocks":
    """Returns the page. Writes its examples and answers to `folder`."""
    import gradio

    names = list(models.infos)
    with gradio.Blocks(title="Large Vision Model", analytics_enabled=False) as blocks:
        gradio.Markdown(_INTRODUCTION)
        model = gradio.Dropdown(
            names,
            value=names[0],
            label="Model",
            info="One model is in memory at a time. The first drawing after a change waits for the new model to load.",
            visible=len(names) > 1,
            elem_id="model",
        )
        text = gradio.Markdown(models.infos[names[0]].text, elem_id="model_text")
        model.change(lambda name: models.infos[name].text, model, text, api_visibility="private")
        page = Page(models, model, folder, fields.history())
        if any(info.max_prompt_images > 2 for info in models.infos.values()):
            with gradio.Tab("Analogy"):
                analogy_tab(page)
        with gradio.Tab("Sequence"):
            sequence_tab(page)
        page.history.gallery.render()
    return blocks
