"""Two processes that write one output: the second one is refused, and told who writes."""

import os
import pathlib

import pytest
from convert_kit import export, import_, tiny_state
from tokenizer_kit import run_main, tiny_vqgan

from EasyLM.data import records
from EasyLM.errors import UserError
from EasyLM.storage import HeartbeatLock
from evaluation.runs import open_results
from tokenizer import convert, detokenize, mix, pack, render
from tokenizer.builders.resumable_file import ResumableFile


@pytest.fixture
def sentences(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(records.record_line([1] * 64) + records.record_line([2] * 64))
    return str(path)


def _import(golden, sentences, out):
    model = export(tiny_state(golden), pathlib.Path(sentences).parent / "hf")
    return lambda: import_(model, f"{out}/params")


def _build(golden, sentences, out):
    def write():
        file = ResumableFile(out, {}, fresh=False)
        try:
            file.claim()
            file.write(b"a line\n")
            file.finish({})
        finally:
            file.close()

    return write


def _evaluate(golden, sentences, out):
    def write():
        with open_results(out, {"checkpoint": "", "vqgan": ""}):
            pathlib.Path(out).touch()

    return write


def _detokenize(golden, sentences, out):
    vqgan = tiny_vqgan(pathlib.Path(sentences).parent / "vqgan")
    return lambda: run_main(detokenize, input_file=sentences, output_dir=out, vqgan=str(vqgan))


WRITERS = {
    "mix": lambda golden, sentences, out: lambda: run_main(mix, inputs=sentences, output_file=out),
    "pack": lambda golden, sentences, out: lambda: run_main(pack, input_files=sentences, output_file=f"{out}.packed"),
    "render": lambda golden, sentences, out: lambda: run_main(render, output_dir=out, num=1, size=16, workers=1),
    "export": lambda golden, sentences, out: lambda: export(tiny_state(golden), out),
    "import": _import,
    "convert": lambda golden, sentences, out: (
        lambda: run_main(convert, vqgan=str(golden / "vqgan_small"), output_dir=out)
    ),
    "build": _build,
    "evaluation": _evaluate,
    "detokenize": _detokenize,
}


@pytest.mark.parametrize(
    "name", [name if name != "detokenize" else pytest.param(name, marks=pytest.mark.slow) for name in WRITERS]
)
def test_the_second_writer_is_told_of_the_first(golden, tmp_path, sentences, name):
    make = WRITERS[name]
    out = str(tmp_path / "out")
    write = make(golden, sentences, out)
    output = f"{out}.packed" if name == "pack" else out
    before = set(os.listdir(tmp_path))
    with HeartbeatLock(output, is_output=True):
        with pytest.raises(UserError, match=rf"{output}: in use by process {os.getpid()} on host .* since"):
            write()
    assert set(os.listdir(tmp_path)) == before  # the first writer's files are untouched, and nothing is left
    write()
    assert set(os.listdir(tmp_path)) >= {os.path.basename(output)} and not list(tmp_path.glob(".*"))
