"""The figures in the cards of the shipped models are those of the documents with the results, and of their files."""

import json
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
IN_CONTEXT = ROOT / "scripts" / "in_context"
DEMO, SMALL = ROOT / "evaluation" / "demo_model", ROOT / "tokenizer" / "pretrained"
METRICS = {
    "segmentation": "scene_iou",
    "depth": "depth_abs_rel",
    "normals": "normal_degrees",
    "edges": "edge_f_score",
}
# Row of the tables of tokenizers -> folder of `tokenizer.render`.
FOLDERS = {
    "scenes": "image",
    "segmentation": "segmentation",
    "depth": "depth",
    "normals": "normals",
    "edges": "edges",
    "photographs, colour": "photo_color",
    "photographs, gray": "photo_gray",
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
    assert f"with 3 shots: {figures}." in card(DEMO)


def test_the_other_tables_of_the_demonstration_model_have_these_figures():
    tasks, splits = table(RESULTS, "| task | perplexity at 0"), table(RESULTS, "| split | segmentation: perplexity")
    for task, cell in zip(METRICS, splits["scenes"], strict=True):
        perplexity, _, _, _, values, copy_last, *_ = tasks[task]
        assert cell == f"{last(perplexity)}, {last(values)} ({copy_last})"
    for row, (_, shown) in table(IN_CONTEXT / "README.md", "| task | this model, 3 and 7 shots").items():
        value, _, error = tasks[row.partition(",")[0]][4].split(", ")[-1].partition(" ± ")
        rounded = f"{float(value):.{len(shown.partition(' ')[0].lstrip('0.'))}g}"
        assert shown == f"{rounded} ± {error}", row
    for row, (_, _, shown) in table(IN_CONTEXT / "README.md", "| split | this model").items():
        split = row.partition("`")[2].partition("`")[0]
        assert shown == ", ".join(cell.split(", ")[1].partition(" ")[0] for cell in splits[split])


def test_both_tables_of_the_small_tokenizer_have_the_same_figures():
    quality, beside = table(SMALL / "README.md", "| images | PSNR"), table(IN_CONTEXT / "README.md", "| images | PSNR")
    assert list(quality) == list(FOLDERS)
    for images, (psnr, ssim, _, perplexity) in quality.items():
        assert [cell.partition(",")[0] for cell in beside[images]] == [psnr, ssim, perplexity]


@pytest.mark.parametrize("folder", [DEMO, IN_CONTEXT / "model"])
def test_the_sizes_of_models_are_those_of_their_files(folder):
    config = llama_config.recorded_config("huggingface", str(folder))
    assert f"{costs.num_parameters(config) / 1e6:.1f} million parameters" in card(folder)
    if folder == DEMO:
        assert f"It has {config.num_hidden_layers} layers of width {config.hidden_size}." in card(folder)
        assert f"the {config.vocab_size:,} codes" in card(folder) and config.tie_word_embeddings
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] in card(folder)


def test_the_steps_of_the_demonstration_model_are_those_of_its_script():
    script = (ROOT / "scripts" / "make_demo_model.sh").read_text()
    runs = {name: int(steps) for name, steps in re.findall(r"train (\w+) \d (\d+) ", script)}
    stages = table(DEMO / "README.md", "| stage | layers | steps")
    steps = [runs["copy"] + runs["all"], runs["deep"], runs["last"]]
    assert [cells[1] for cells in stages.values()] == [f"{count:,}" for count in steps]
    assert f"{sum(steps) * 4 * 512 / 1e6:.0f} million tokens" in card(DEMO)


@pytest.mark.parametrize("folder", [SMALL, IN_CONTEXT / "tokenizer"])
def test_the_sizes_of_tokenizers_are_those_of_their_files(folder):
    settings = read_json(folder / "config.json")
    assert f"{settings['resolution']}x{settings['resolution']} pixels" in card(folder)
    assert f"8x8 tokens of {settings['num_embeddings']:,} codes" in card(folder)
    if folder == SMALL:
        count = sum(array.size for array in weights.parameters(weights.load(folder)).values())
        size = (folder / "model.safetensors").stat().st_size
        assert f"{count / 1e6:.1f} million parameters in float16 ({size / 1e6:.1f} MB)" in card(folder)


@pytest.mark.slow
def test_the_figures_of_the_tokenizers_are_measured_again(tmp_path):
    """With the commands of the card."""
    run_main(
        render, output_dir=str(tmp_path), size=32, num=64, num_photos=64, num_flat=64, seed=2, held_out_photos=True
    )
    folders = FOLDERS | {"flat areas (`render --num_flat=64`)": "flat"}
    beside = table(IN_CONTEXT / "README.md", "| images | PSNR")
    quality = table(SMALL / "README.md", "| images | PSNR")
    for number, vqgan in enumerate((SMALL, IN_CONTEXT / "tokenizer")):
        inputs = [f"{tmp_path}/{folder}" for folder in folders.values()]
        output = tmp_path / f"{number}.json"
        run_main(eval_vqgan, vqgan=str(vqgan), input_dirs=",".join(inputs), output_json=str(output))
        measured = read_json(output)
        for images, path in zip(folders, inputs, strict=True):
            metrics = measured[path]
            shown = f"{metrics['psnr']:.2f}", f"{metrics['ssim']:.3f}", f"{metrics['code_perplexity']:.0f}"
            assert tuple(cell.split(", ")[number] for cell in beside[images]) == shown
            if vqgan == SMALL and images in quality:
                assert quality[images][2] == f"{metrics['codes_used']:.1%}"
