"""The figures in the cards of the shipped models are those of the documents with the results, and of their files."""

import dataclasses
import pathlib
import re

import pytest
from tokenizer_kit import run_main

from EasyLM.models.llama import costs, llama_config
from EasyLM.storage import read_json
from tokenizer import eval_vqgan, render
from tokenizer.vqgan import weights

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "evaluation" / "EVAL.md"
DEMO, SMALL = ROOT / "evaluation" / "demo_model", ROOT / "tokenizer" / "pretrained"
METRICS = {
    "segmentation": "scene_iou",
    "depth": "depth_abs_rel",
    "normals": "normal_degrees",
    "edges": "edge_f_score",
}
# Row of the table of the tokenizer -> folder of `tokenizer.render`.
FOLDERS = {
    "scenes": "image",
    "segmentation": "segmentation",
    "depth": "depth",
    "normals": "normals",
    "edges": "edges",
    "photographs, colour": "photo_color",
    "photographs, gray": "photo_gray",
    "flat areas (`render --num_flat=64`)": "flat",
}


def table(path: pathlib.Path, begin: str) -> dict[str, list[str]]:
    """Returns the cells of each row, by the first one, of the table whose header begins with a text."""
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(begin)) + 2
    rows = {}
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


def last(cell: str) -> str:
    """Returns the value at the most shots, without its error."""
    return cell.split(", ")[-1].partition(" ")[0]


def card(folder: pathlib.Path) -> str:
    return " ".join((folder / "README.md").read_text().split())


def test_the_card_of_the_demonstration_model_has_the_measured_figures():
    tasks = table(RESULTS, "| task | perplexity at 0")
    values = {task: last(tasks[task][4]) for task in METRICS}
    figures = ", ".join(
        f"`{metric}`{' of segmentation' if task == 'segmentation' else ''} {values[task]}"
        for task, metric in METRICS.items()
    )
    assert all(tasks[task][3] == f"`{metric}`" for task, metric in METRICS.items())
    assert f"with 7 shots: {figures}." in card(DEMO)


def test_the_other_tables_of_the_demonstration_model_have_these_figures():
    tasks, splits = table(RESULTS, "| task | perplexity at 0"), table(RESULTS, "| split | segmentation: perplexity")
    for task, cell in zip(METRICS, splits["scenes"], strict=True):
        perplexity, _, _, _, values, copy_last, *_ = tasks[task]
        assert cell == f"{last(perplexity)}, {last(values)} ({copy_last})"


def test_the_sizes_of_the_demonstration_model_are_those_of_its_files():
    config = llama_config.recorded_config("huggingface", str(DEMO))
    settings = llama_config.load_config(f"json::{ROOT}/scripts/demo_model/settings.json")
    assert dataclasses.replace(config, scan_layers=False) == settings
    for document in (card(DEMO), " ".join((ROOT / "README.md").read_text().split())):
        assert f"{costs.num_parameters(config) / 1e6:.1f} million parameters" in document
    assert f"It has {config.num_hidden_layers} layers of width {config.hidden_size}." in card(DEMO)
    assert f"the {config.vocab_size:,} codes" in card(DEMO) and config.tie_word_embeddings
    assert read_json(DEMO / "config.json")["torch_dtype"] in card(DEMO)
    assert all(path.stat().st_size < 15e6 for path in DEMO.iterdir())


def test_the_steps_of_the_demonstration_model_are_those_of_its_script():
    script = (ROOT / "scripts" / "make_demo_model.sh").read_text()
    gpu = script[script.index("gpu)\n") : script.index("cpu)\n")]
    steps, batch_size = (int(re.search(rf"{name}:-(\d+)", gpu)[1]) for name in ("STEPS", "BATCH"))
    tokens = steps * batch_size * 1024 / 1e6
    assert f"{steps:,} steps of {batch_size} sentences of all families, {tokens:.0f} million tokens" in card(DEMO)


def test_the_sizes_of_the_small_tokenizer_are_those_of_its_files():
    settings = read_json(SMALL / "config.json")
    assert f"{settings['resolution']}x{settings['resolution']} pixels" in card(SMALL)
    assert f"8x8 tokens of {settings['num_embeddings']:,} codes" in card(SMALL)
    count = sum(array.size for array in weights.parameters(weights.load(SMALL)).values())
    size = (SMALL / "model.safetensors").stat().st_size
    assert f"{count / 1e6:.1f} million parameters in float16 ({size / 1e6:.1f} MB)" in card(SMALL)


@pytest.mark.slow
def test_the_figures_of_the_small_tokenizer_are_measured_again(tmp_path):
    """With the commands of the card."""
    run_main(
        render, output_dir=str(tmp_path), size=32, num=64, num_photos=64, num_flat=64, seed=2, held_out_photos=True
    )
    quality = table(SMALL / "README.md", "| images | PSNR")
    assert list(quality) == list(FOLDERS)
    inputs = [f"{tmp_path}/{folder}" for folder in FOLDERS.values()]
    output = tmp_path / "figures.json"
    run_main(eval_vqgan, vqgan=str(SMALL), input_dirs=",".join(inputs), output_json=str(output))
    for shown, path in zip(quality.values(), inputs, strict=True):
        metrics = read_json(output)[path]
        assert shown == [
            f"{metrics['psnr']:.2f}",
            f"{metrics['ssim']:.3f}",
            f"{metrics['codes_used']:.1%}",
            f"{metrics['code_perplexity']:.0f}",
        ]
