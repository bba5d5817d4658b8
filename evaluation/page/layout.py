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
/* Nothing to see yet. */
[id^="reconstructions_"]:has(> .empty), #history:has(> .empty), [id^="download_"][disabled] {
  display: none !important;
}
[id^="answers_"] > .empty { min-height: 120px !important; padding: 12px !important; text-align: center; }
[id^="answers_"] > .empty .icon { display: none; }
[id^="answers_"] > .empty::after {
  content: "The answers appear here. Click an example above, then Draw."; color: var(--neutral-500);
}
/* Buttons are large enough for a finger. The name of an image slot does not cover its image. */
.icon-button, .toolbar-wrap button, .source-selection button, .delete-button {
  min-width: 32px !important; min-height: 32px !important;
}
.tab-like-container { height: 32px !important; } /* the number of a slider */
.reset-button { min-width: 32px; }
.source-selection svg { padding: 6px; }
.slot > label { position: static !important; }
.slot > .image-container { height: calc(100% - 28px) !important; }
@media (max-width: 640px) {
  .grid-container { grid-template-columns: repeat(2, minmax(100px, 1fr)) !important; }
  #frames .grid-container { grid-template-columns: repeat(3, minmax(80px, 1fr)) !important; }
  /* The tools of the canvas lie below the image, not on it. */
  .toolbar-wrap, .toolbar-wrap .half-container { flex-direction: row !important; }
  .toolbar-wrap { inset: auto auto 8px 8px !important; width: auto !important; }
  .toolbar-wrap .half-container { position: static !important; }
  .toolbar-wrap .half-container > .wrap {
    inset: auto auto 100% 0 !important; max-width: none !important; transform: none !important;
  }
}
"""
_INTRODUCTION = """# Large Vision Model
Show the model what you want, in pictures; it draws what follows. Nothing else tells it what the task is."""


def theme() -> "gradio.Theme":
    """Returns gradio's theme, with a bold font that has all letters. The file of its semi-bold font lacks most."""
    import gradio

    fonts = [gradio.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "ui-sans-serif", "system-ui", "sans-serif"]
    return gradio.themes.Default(font=fonts)


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
