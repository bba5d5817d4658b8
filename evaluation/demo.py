"""A page to try a model on: `python -m evaluation.demo`, then http://127.0.0.1:7860.

Without flags it shows the model that ships with the project, whose pictures are 32 pixels wide and drawn larger. It
listens on this machine alone unless `--host` says otherwise, and loads nothing from elsewhere.
"""

import contextlib
import dataclasses
import os
import pathlib
import queue
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from EasyLM.errors import UserError, check_installed
from EasyLM.flags import Flag, run
from evaluation.serving import page_examples, uploads
from evaluation.serving.batcher import ClosedError, QueueFullError
from evaluation.serving.engine import ENGINE_FLAGS, Engine, Prompt, Settings
from evaluation.serving.uploads import Limits, Refused
from tokenizer.media import grids, images

FLAGS = {
    **ENGINE_FLAGS,
    "checkpoint": Flag(
        str(pathlib.Path(__file__).with_name("demo_model")), "The model: PREFIX::FILE, or a Hugging Face directory."
    ),
    "max_batch": Flag(1, "Visitors whose pictures are drawn at the same time: a power of two; changes no result."),
    "host": Flag("127.0.0.1", "Address to listen on; 0.0.0.0: every network that this machine is in."),
    "port": Flag(7860, "Port to listen on."),
}
FIRST = Settings(n_candidates=4, temperature=1.0, top_p=0.9)
MAX_CANDIDATES, MAX_FRAMES, MAX_PAIRS = 8, 8, 7
LIMITS = Limits()
_PLACES = [*range(0, 2 * page_examples.PAIRS + 1, 2), *range(1, 2 * page_examples.PAIRS, 2)]  # questions above answers
_SHOWN = 256  # pictures are drawn at least so large, pixel by pixel
_KEPT_SECONDS = 3600  # files of visitors
_CSS = ".grid-wrap.fixed-height { min-height: 0 !important; }"  # galleries as high as their pictures
_INTRODUCTION = """# Large Vision Model
Show the model what you want, in pictures; it draws what follows. Nothing else tells it what the task is."""


def main(config) -> None:
    """Shows the page until Ctrl-C."""
    check_installed("the page", "serve", "gradio")
    if not 0 <= config.port < 2**16:
        raise UserError(f"--port={config.port}: must be 0..65535")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    engine = Engine.load(config)
    engine.warm_up(FIRST)
    with tempfile.TemporaryDirectory(prefix="lvm_demo_") as folder:
        build(engine, pathlib.Path(folder)).queue(
            max_size=config.max_queue, default_concurrency_limit=2 * config.max_batch
        ).launch(
            server_name=config.host,
            server_port=config.port or None,
            share=False,
            ssr_mode=False,
            enable_monitoring=False,
            max_file_size=LIMITS.body_bytes,
            allowed_paths=[folder],
            footer_links=[],
            css=_CSS,
        )
        engine.close(timeout=10)


def build(engine: Engine, folder: pathlib.Path):
    """The page (`gradio.Blocks`). Files that it offers are put into `folder`."""
    import gradio

    with gradio.Blocks(
        title="Large Vision Model", analytics_enabled=False, delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS)
    ) as page:
        gradio.Markdown(_INTRODUCTION)
        with gradio.Tab("Analogy"):
            _analogy_tab(engine, folder)
        with gradio.Tab("Sequence"):
            _sequence_tab(engine, folder)
    return page


def _analogy_tab(engine: Engine, folder: pathlib.Path) -> None:
    """Pairs of pictures beside each other, then a query: the model draws what belongs below it."""
    import gradio

    most = min(MAX_PAIRS, (engine.max_pictures - 1) // 2)
    shown = min(page_examples.PAIRS, most)
    found = page_examples.analogies(engine.resolution)
    gallery = _example_gallery(_sheets(found, _PLACES, folder, "analogy"), "analogy")
    slots, columns = [], []
    with gradio.Row():
        for i in range(most):
            with gradio.Column(visible=i < shown, min_width=120) as column:
                slots += [_slot(f"Example {i + 1}"), _slot(f"Answer {i + 1}")]
            columns.append(column)
        with gradio.Column(min_width=120):
            slots.append(_slot("Query"))
            pairs = gradio.Slider(1, most, shown, step=1, label="Pairs")
    settings, button = _settings(with_frames=False)
    outputs = _outputs("analogy")

    def choose(event: gradio.SelectData):
        files = _files(found[event.index], folder, f"analogy_{event.index}")[-2 * most - 1 :]
        blank = [None] * (2 * most + 1 - len(files))
        return [len(files) // 2, *files[:-1], *blank, files[-1]]

    def answer(count, *values):
        files = [*values[: 2 * count], values[2 * most]]
        if None in files:
            raise _said("Put a picture into every place, or set fewer pairs.")
        yield from draw(engine, files, _chosen(values[2 * most + 1 :]), folder)

    def resize(count):
        return [gradio.Column(visible=i < count) for i in range(most)]

    pairs.change(resize, pairs, columns, api_visibility="private")
    gallery.select(choose, None, [pairs, *slots], api_visibility="private")
    button.click(answer, [pairs, *slots, *settings], outputs, api_visibility="private")


def _sequence_tab(engine: Engine, folder: pathlib.Path) -> None:
    """Frames in order: the model draws the next ones."""
    import gradio

    found = page_examples.sequences(engine.resolution)
    gallery = _example_gallery(_sheets(found, list(range(page_examples.FRAMES)), folder, "sequence"), "sequence")
    frames = gradio.Gallery(
        label="Frames, in order: drop pictures here",
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
    settings, button = _settings(with_frames=True)
    outputs = _outputs("sequence")

    def choose(event: gradio.SelectData):
        return _files(found[event.index], folder, f"sequence_{event.index}")

    def answer(pictures, *values):
        if not pictures:
            raise _said("Put at least one frame into the row.")
        files = [path for path, _ in pictures][-engine.max_pictures :]
        yield from draw(engine, files, _chosen(values), folder)

    gallery.select(choose, None, frames, api_visibility="private")
    button.click(answer, [frames, *settings], outputs, api_visibility="private")


def _slot(label: str):
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
    # Gradio's own unpacks the file, whatever its size, and loses transparency and 16-bit gray: `uploads.decode` is to
    # see the file as it came. Set here, as gradio writes a .pyi file beside the source of every subclass.
    slot.preprocess = _path_of
    return slot


def _path_of(payload) -> str | None:
    return payload and payload.path


def _settings(with_frames: bool):
    """The fields of `_chosen`, in its order, and the button."""
    import gradio

    with gradio.Row():
        fields = [
            gradio.Slider(1, MAX_CANDIDATES, FIRST.n_candidates, step=1, label="Candidates", min_width=120),
            gradio.Slider(0, 2, FIRST.temperature, step=0.05, label="Temperature", min_width=120),
            gradio.Slider(0.05, 1, FIRST.top_p, step=0.05, label="Top-p", min_width=120),
            gradio.Number(FIRST.seed, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, min_width=120),
        ]
        fields.append(
            gradio.Slider(
                1, MAX_FRAMES, FIRST.n_new_frames, step=1, label="New frames", min_width=120, visible=with_frames
            )
        )
    return fields, gradio.Button("Draw", variant="primary", elem_id="draw_sequence" if with_frames else "draw_analogy")


def _chosen(values) -> Settings:
    candidates, temperature, top_p, seed, frames = values
    return dataclasses.replace(
        FIRST,
        n_candidates=int(candidates),
        temperature=float(temperature),
        top_p=float(top_p),
        seed=int(seed or 0),
        n_new_frames=int(frames),
    )


def _outputs(name: str):
    """Where `draw` puts what it yields."""
    import gradio

    return [
        gradio.Markdown("", elem_id=f"status_{name}"),
        gradio.Gallery(
            label="The model's answers",
            format="png",
            columns=4,
            rows=1,
            height="auto",
            object_fit="contain",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id=f"answers_{name}",
        ),
        gradio.DownloadButton("Download all as PNG", interactive=False, size="sm", elem_id=f"download_{name}"),
    ]


def _example_gallery(sheets: list, name: str):
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
        elem_id=f"examples_{name}",
    )


def draw(engine: Engine, files: list[str], settings: Settings, folder: pathlib.Path) -> Iterator[tuple]:
    """Status, pictures and download button, again and again while the tokens come."""
    import gradio

    off = gradio.DownloadButton(interactive=False)
    news: queue.SimpleQueue = queue.SimpleQueue()
    try:
        pictures = uploads.decode([pathlib.Path(file).read_bytes() for file in files], engine.resolution, LIMITS)
        future = engine.generate(Prompt(pictures=pictures), settings, news.put)
    except (UserError, Refused, QueueFullError, ClosedError) as error:
        raise _said(str(error)) from None
    future.add_done_callback(lambda _: news.put(None))
    try:
        yield _first_status(engine), [], off
        while (newest := news.get()) is not None:
            yield f"Drawing: {newest.done} of {newest.total} tokens", _captioned(newest.pictures), off
        answer = future.result()
    finally:
        future.cancel()  # where the visitor has left
    file = _save(answer.pictures, folder)
    yield (
        f"Done: {answer.tokens[0].size} tokens a candidate",
        _captioned(answer.pictures),
        gradio.DownloadButton(value=str(file), interactive=True),
    )


def _first_status(engine: Engine) -> str:
    if engine.state == "failed":
        return f"Warming up failed ({engine.fault}), trying all the same ..."
    return "Compiling for the first picture ..." if engine.state == "warming up" else "Reading the prompt ..."


def _said(message: str) -> Exception:
    """What a visitor did wrong: shown until it is closed, and no matter for the log."""
    import gradio

    return gradio.Error(message, duration=None, print_exception=False)


def _captioned(pictures_CF: np.ndarray) -> list[tuple[np.ndarray, str]]:
    frames = pictures_CF.shape[1]
    return [
        (_enlarged(images.to_uint8(one)), f"{c + 1}" if frames == 1 else f"{c + 1}: frame {f + 1}")
        for c, row in enumerate(pictures_CF)
        for f, one in enumerate(row)
    ]


def _enlarged(picture: np.ndarray) -> np.ndarray:
    times = -(-_SHOWN // len(picture))
    return picture.repeat(times, 0).repeat(times, 1)


def _save(pictures_CF: np.ndarray, folder: pathlib.Path) -> pathlib.Path:
    """A row for each candidate, a column for each new picture, as they are; older answers than an hour go."""
    for old in folder.glob("answer_*.png"):
        with contextlib.suppress(FileNotFoundError):  # another visitor's answer came at the same time
            if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
                old.unlink()
    flat = images.to_uint8(pictures_CF.reshape(-1, *pictures_CF.shape[2:]))
    with tempfile.NamedTemporaryFile(dir=folder, prefix="answer_", suffix=".png", delete=False) as file:
        file.write(images.png_bytes(grids.grid(flat, pictures_CF.shape[1])))
    return pathlib.Path(file.name)


def _files(example: page_examples.Example, folder: pathlib.Path, name: str) -> list[str]:
    paths = [folder / f"{name}_{i}.png" for i in range(len(example.pictures))]
    for path, picture in zip(paths, example.pictures, strict=True):
        images.save(path, _enlarged(picture))
    return [str(path) for path in paths]


def _sheets(
    found: list[page_examples.Example], order: list[int], folder: pathlib.Path, name: str
) -> list[tuple[str, str]]:
    """A picture of each prompt, for the gallery of examples: its pictures in two rows, in this order."""
    sheets = []
    for i, example in enumerate(found):
        path = folder / f"{name}_{i}.png"
        enlarged = np.stack([_enlarged(example.pictures[k]) for k in order])
        images.save(path, grids.grid(enlarged, -(-len(order) // 2), gap=16))
        sheets.append((str(path), example.name))
    return sheets


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
