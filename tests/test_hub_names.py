"""Every program takes a model and a tokenizer by its name on the Hugging Face Hub, from huggingface_hub's cache.

In the tests of all programs the files are damaged: each program ends with the name of the first one that it reads,
before it computes anything.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import numpy as np
import pytest
from convert_kit import export, import_
from data_kit import base64_line
from evaluation_programs import PROGRAMS, write_inputs
from hub_cache import cache_repository, offline_cache
from prompting_kit import CONFIG, tiny_checkpoint
from runs_kit import read_json, write_line_examples
from tiny_run import metrics, train
from tokenizer_kit import run_main

from EasyLM import flags
from EasyLM.errors import UserError
from evaluation import eval_perplexity
from tokenizer import build, detokenize
from tokenizer.vqgan import Codec

ROOT = pathlib.Path(__file__).parent.parent
DATA = "--train_dataset.json_dataset.path={0}/data.jsonl"
# Program -> the flags that it needs besides a tokenizer.
TOKENIZER = {
    "tokenizer.build": "--kind=paired --input_dir={0}/in --target_dir={0}/in --output_file={1}/out.jsonl",
    "tokenizer.mappings.__main__": "--output_file={1}/out.jsonl",
    "tokenizer.detokenize": "--input_file={0}/lines.jsonl --output_dir={1}/out",
    "tokenizer.eval_vqgan": "--input_dirs={0}/in",
    "tokenizer.convert": "--output_dir={1}/out",
    "flat_colours": "",
}
# (Program, flag) -> its value for a name, and other flags.
MODELS = {(program, "checkpoint"): ("{name}", rest) for program, rest in PROGRAMS.items()} | {
    ("EasyLM.models.llama.llama_train", "load_checkpoint"): ("huggingface::{name}", DATA),
    ("EasyLM.models.llama.llama_plan", "load_checkpoint"): ("huggingface::{name}", "--topology=cpu:8"),
    ("EasyLM.models.llama.convert_hf_to_easylm", "hf_model"): ("{name}", "--output_file={1}/out/params"),
}
FILES = {
    ("EasyLM.models.llama.convert_easylm_to_hf", "load_checkpoint"): (
        "params::{name}/streaming_params",
        "--output_dir={1}/out",
    ),
    ("EasyLM.models.llama.convert_checkpoint", "load_checkpoint"): (
        "params::{name}/streaming_params",
        "--output={1}/out",
    ),
    ("tokenizer.train_vqgan", "load_checkpoint"): ("trainstate::{name}/streaming_params", "--input_dirs={0}/in"),
}
TOKENIZERS = {(program, "vqgan"): ("{name}", rest) for program, rest in TOKENIZER.items()} | {
    (program, "vqgan"): ("{name}", f"{rest} --checkpoint={{0}}/model") for program, rest in PROGRAMS.items()
}
# load_test passes the flags on to the service; vllm_client asks its server first: its test is that of `Codec`.
OTHERS = {("load_test", "checkpoint"), ("load_test", "vqgan"), ("vllm_client", "vqgan")}


FLAG_TABLE = re.compile('"(vqgan|checkpoint|load_checkpoint|hf_model)": |CODEC_FLAGS|PROMPTER_FLAGS|MODEL_FLAGS')


def programs() -> Iterator[str]:
    """Yields the modules with a `main` that takes flags."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        for entry in tomllib.load(file)["project"]["scripts"].values():
            yield entry.partition(":")[0]
    for path in (ROOT / "scripts").glob("*.py"):
        if FLAG_TABLE.search(path.read_text()):  # without an import: some scripts set XLA's options
            yield path.stem


def test_no_program_is_missing():
    found = {
        (program, name)
        for program in programs()
        for name, flag in importlib.import_module(program).FLAGS.items()
        if name in ("checkpoint", "load_checkpoint", "hf_model", "vqgan") and isinstance(flag, flags.Flag)
    }
    assert found == {*MODELS, *FILES, *TOKENIZERS, *OTHERS}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    """The inputs of all programs, the settings of a model without weights, and a cache with damaged files."""
    folder, damaged = tmp_path_factory.mktemp("inputs"), b"x"
    write_inputs(folder)
    (folder / "data.jsonl").write_text("{}")
    (folder / "model").mkdir()
    settings = {"model_type": "llama", "hidden_act": "silu", "max_position_embeddings": CONFIG.max_sequence_length}
    (folder / "model" / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG) | settings))
    files = {"config.json": damaged, "model.safetensors": damaged, "streaming_params": damaged}
    cache_repository(folder / "hub", "Owner/main", files)
    cache_repository(folder / "hub", "Owner/other", {f"v1.5/{name}": data for name, data in files.items()}, "v2")
    cache_repository(folder / "hub", "Owner/local", files)
    (folder / "Owner" / "local").mkdir(parents=True)
    for name, data in files.items():
        (folder / "Owner" / "local" / name).write_bytes(data)
    return folder


@pytest.fixture
def error_of(inputs, tmp_path, monkeypatch, capsys):
    """Returns the function that runs a program and returns its error."""
    offline_cache(inputs, monkeypatch)

    def error_of(program: str, given: str, rest: str) -> str:
        module = importlib.import_module(program)
        config = flags.parse(module.FLAGS, [program, given, *rest.format(inputs, tmp_path).split()])
        try:
            assert module.main(config) == 1  # llama_plan prints its error
        except UserError as error:
            return str(error)
        return capsys.readouterr().err

    return error_of


@pytest.mark.parametrize(("program", "flag"), {**MODELS, **FILES, **TOKENIZERS})
def test_files_are_found_by_the_name_of_their_repository(error_of, program, flag):
    """A repository, a folder of a revision, and a local directory, which wins."""
    value, rest = {**MODELS, **FILES, **TOKENIZERS}[program, flag]
    for name, folder in {
        "Owner/main": r"\S+/hub/models--Owner--main/snapshots/\w{40}",
        "Owner/other@v2/v1.5": r"\S+/hub/models--Owner--other/snapshots/\w{40}/v1\.5",
        "Owner/local": r"(/\S+/)?Owner/local",
    }.items():
        error = error_of(program, f"--{flag}={value.format(name=name)}", rest)
        assert re.search(rf"(^|\s){folder}/(config\.json|model\.safetensors|streaming_params): ", error), error


@pytest.mark.parametrize(("program", "flag"), {**MODELS, **TOKENIZERS})
def test_a_directory_of_an_object_store_is_refused(error_of, program, flag):
    """With the remedy, also where the package of the object store is not installed."""
    value, rest = {**MODELS, **TOKENIZERS}[program, flag]
    prefix = "huggingface::" if flag == "checkpoint" else ""
    error = error_of(program, f"--{flag}={prefix}{value.format(name='gs://lab/model')}", rest)
    what = "a tokenizer" if flag == "vqgan" else "a Hugging Face model"
    assert f"gs://lab/model: {what} is read from a local disk, or by its name on the Hugging Face Hub" in error
    assert error.strip().endswith(": copy it to a disk and give that path")


def test_a_checkpoint_of_an_object_store_without_a_prefix(error_of):
    program = "evaluation.eval_perplexity"
    error = error_of(program, "--checkpoint=memory://lab/model", PROGRAMS[program])
    assert error.startswith("--checkpoint=memory://lab/model (a Hugging Face model, as it has no PREFIX::): memory://")


def test_a_name_without_a_prefix_is_told_the_prefix(error_of):
    error = error_of("EasyLM.models.llama.llama_plan", "--load_checkpoint=Owner/main", "--topology=cpu:8")
    assert error.strip().endswith("; a model on the Hugging Face Hub is huggingface::Owner/main")


@pytest.fixture
def small(tmp_path, monkeypatch) -> dict[str, str]:
    """A cache with a small model and its tokenizer. Returns their local paths and the flags of an evaluation."""
    cache = offline_cache(tmp_path, monkeypatch)
    local = tiny_checkpoint(tmp_path)
    metadata = {"step": 1, "llama_config": dataclasses.asdict(CONFIG), "tokenizer": Codec(local["vqgan"]).digest}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    export(local["checkpoint"], tmp_path / "repository" / "model", max_shard_mb=0.01, float_dtype="bf16")
    assert len([*(tmp_path / "repository" / "model").glob("model-*.safetensors")]) > 1
    cache_repository(cache, "Owner/lvm", tmp_path / "repository", "v1")
    cache_repository(cache, "Owner/tokenizer", pathlib.Path(local["vqgan"]))
    return {"checkpoint": f"{tmp_path}/repository/model", "vqgan": local["vqgan"], **write_line_examples(tmp_path)}


@pytest.mark.slow
def test_an_evaluation_by_names_equals_that_of_local_files(small, tmp_path):
    """As a process, without a network by the environment alone."""
    run_main(eval_perplexity, **small, output_json=f"{tmp_path}/local.json")
    named = small | {"checkpoint": "Owner/lvm@v1/model", "vqgan": "Owner/tokenizer", "output_json": "named.json"}
    command = [sys.executable, "-m", "evaluation.eval_perplexity", *(f"--{k}={v}" for k, v in named.items())]
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=240)
    local, by_names = (read_json(tmp_path / f"{name}.json") for name in ("local", "named"))
    assert by_names["perplexity"] == local["perplexity"] and by_names["examples"] == local["examples"]


@pytest.mark.slow
def test_training_takes_the_settings_and_parameters_of_a_name(small, tmp_path):
    """The first step of a run from a name on the Hub equals that of a run from the directory."""
    (tmp_path / "data.jsonl").write_text(base64_line(np.arange(256) % 32))
    runs = {}
    for name in ("Owner/lvm@v1/model", small["checkpoint"]):
        settings = {"load_checkpoint": f"huggingface::{name}", "load_llama_config": "", "update_llama_config": ""}
        data = {"path": str(tmp_path / "data.jsonl"), "seq_length": 16, "batch_size": 8}
        settings |= {f"train_dataset.json_dataset.{key}": value for key, value in data.items()}
        runs[name] = train(tmp_path / f"run{len(runs)}", mesh_dim="8,1,1", total_steps=1, save_model_freq=1, **settings)
    first, second = (metrics(run, "loss", "gradient_norm", "param_norm") for run in runs.values())
    assert first == second and len(first) == 1
    record = read_json(next(iter(runs.values())) / "metadata.json")
    assert record["llama_config"]["hidden_size"] == CONFIG.hidden_size
    assert record["started_from"] == ["huggingface::Owner/lvm@v1/model"]


@pytest.mark.slow
def test_sentences_are_built_and_decoded_with_a_tokenizer_by_its_name(small, tmp_path):
    for number, vqgan in enumerate(("Owner/tokenizer", small["vqgan"])):
        file, folder = str(tmp_path / f"{number}.jsonl"), str(tmp_path / f"{number}")
        run_main(build, kind="images", input_dir=small["input_base_dir"], output_file=file, vqgan=vqgan)
        run_main(detokenize, input_file=file, output_dir=folder, vqgan=vqgan)
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    pages = [[path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "01"]
    assert pages[0] == pages[1] and pages[0]


@pytest.mark.slow
def test_a_model_is_imported_by_its_name(small, tmp_path):
    for folder, name in {"named": "Owner/lvm@v1/model", "local": small["checkpoint"]}.items():
        import_(name, tmp_path / folder / "params")
    assert (tmp_path / "named" / "params").read_bytes() == (tmp_path / "local" / "params").read_bytes()
    assert read_json(tmp_path / "named" / "metadata.json")["tokenizer"] == Codec(small["vqgan"]).digest
