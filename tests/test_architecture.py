"""The layout is a test: a module imports only from tiers below its own, and heavy packages only inside functions."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Each tier may import what stands above it in this list. Entry points come last: nothing imports them.
TIERS = [
    {"EasyLM.vocab", "EasyLM.errors"},
    # pure functions and small parts
    {"EasyLM.flags", "EasyLM.losses", "EasyLM.stacking", "EasyLM.columns", "EasyLM.workers", "EasyLM.mixing"},
    {
        "EasyLM.files",
        "EasyLM.restricted_pickle",
        "EasyLM.sharding",
        "EasyLM.processes",
        "EasyLM.attention",
        "EasyLM.generate",
    },
    {"EasyLM.optimizers", "EasyLM.logger", "EasyLM.text", "EasyLM.msgpack_arrays", "EasyLM.records", "EasyLM.rows"},
    {"EasyLM.fields", "EasyLM.examples", "EasyLM.batches", "EasyLM.streaming", "EasyLM.metadata"},
    {"EasyLM.run_directory", "EasyLM.line_index", "EasyLM.token_store", "EasyLM.loading", "EasyLM.line_file"},
    {"EasyLM.packed", "EasyLM.mixed_rows"},
    # the two things a run rests on
    {"EasyLM.json_lines", "EasyLM.checkpoint"},
    {"EasyLM.data", "EasyLM.train", "EasyLM.loop"},
    {"EasyLM.run"},
    # the model
    {"EasyLM.models.llama.llama_config", "EasyLM.models.llama.hf_files"},
    {"EasyLM.models.llama.llama_model"},
    {"EasyLM.models.llama.hf_layout", "EasyLM.models.llama.llama_decode"},
    # pictures
    {
        "tokenizer.images",
        "tokenizer.metrics",
        "tokenizer.scenes",
        "tokenizer.spread",
        "tokenizer.vqgan",
        "tokenizer.problems",
        "tokenizer.resumable",
        "tokenizer.shuffle",
        "tokenizer.charts",
    },
    {"tokenizer.photos", "tokenizer.weights", "tokenizer.videos"},
    {
        "tokenizer.codec",
        "tokenizer.adversary",
        "tokenizer.inception",
        "tokenizer.lpips",
        "tokenizer.pictures",
        "tokenizer.sentence_files",
    },
    {"tokenizer.objective", "tokenizer.collect", "tokenizer.sentences", "tokenizer.code_cache"},
    {"tokenizer.groups", "tokenizer.pipeline"},
    {"tokenizer.kinds"},
    # prompts
    {"evaluation.metrics", "evaluation.pictures", "evaluation.prompts", "evaluation.models", "evaluation.demo_prompts"},
    {"evaluation.prompter", "evaluation.tasks", "evaluation.plots", "evaluation.examples", "evaluation.clips"},
    {"evaluation.benchmarks", "evaluation.runners", "evaluation.batching"},
    # the service and the page
    {"evaluation.partial", "evaluation.uploads"},
    {"evaluation.engine", "evaluation.guard"},
    {"evaluation.requests", "evaluation.replies"},
    {"evaluation.service"},
    # entry points
    {
        "EasyLM.models.llama.llama_train",
        "EasyLM.models.llama.llama_serve",
        "EasyLM.models.llama.convert_easylm_to_hf",
        "EasyLM.models.llama.convert_hf_to_easylm",
        "tokenizer.render",
        "tokenizer.build",
        "tokenizer.mix",
        "tokenizer.pack",
        "tokenizer.inspect",
        "tokenizer.detokenize",
        "tokenizer.train_vqgan",
        "tokenizer.eval_vqgan",
        "evaluation.fewshot",
        "evaluation.demo",
        "evaluation.eval_perplexity",
        "evaluation.batch_generation",
        "evaluation.eval_video_perplexity",
        "evaluation.generate_videos",
    },
]
# The one entry point that joins all three packages: users know it by this name, and nothing imports it.
JOINS_ALL = "EasyLM.models.llama.llama_serve"
LAZY = {"torch", "transformers", "datasets", "sentencepiece", "tokenizers", "av", "gradio", "fastapi", "uvicorn"}
LAZY |= {"skimage", "sklearn", "wandb", "matplotlib", "starlette", "fastapi_offline"}


def modules():
    """Every module of the three packages by its dotted name."""
    found = {}
    for package in ("EasyLM", "tokenizer", "evaluation"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if not name.endswith("__init__"):
                found[name] = path
    return found


MODULES = modules()


def imports(path, top_level_only=False):
    """The modules that a file imports, as dotted names of modules, not of what is taken from them."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (name if name in MODULES else node.module for name in names)


def test_every_module_has_its_tier():
    listed = [name for tier in TIERS for name in tier]
    assert sorted(listed) == sorted(MODULES), "add new modules to TIERS (and to the README's tree)"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    height = {module: i for i, tier in enumerate(TIERS) for module in tier}
    for imported in imports(MODULES[name]):
        if imported in MODULES:
            assert height[imported] < height[name], f"{name} imports {imported}, which is not below it"


def test_packages_know_only_those_below():
    below = {"EasyLM": {"EasyLM"}, "tokenizer": {"EasyLM", "tokenizer"}, "evaluation": set(MODULES)}
    for name, path in MODULES.items():
        package = name.split(".")[0] if name != JOINS_ALL else "evaluation"
        for imported in set(imports(path)) & set(MODULES):
            assert imported.split(".")[0] in below[package] or imported in below[package], f"{name} imports {imported}"
            assert package != "tokenizer" or not imported.startswith("EasyLM.models"), f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_optional_packages_are_imported_where_needed(name):
    heavy = {module.split(".")[0] for module in imports(MODULES[name], top_level_only=True)} & LAZY
    assert not heavy, f"{name} imports {heavy} at its top"


def test_entry_points_are_imported_by_nobody():
    entry_points = {name for name, path in MODULES.items() if '__name__ == "__main__"' in path.read_text()}
    for name, path in MODULES.items():
        assert not entry_points & set(imports(path)), f"{name} imports an entry point"
