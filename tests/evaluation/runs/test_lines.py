"""JSONL files of examples: parsing, and errors that name the line."""

import gzip

import pytest
from runs_kit import clip_settings
from tokenizer_kit import run_main

from EasyLM.errors import UserError
from evaluation import batch_generation
from evaluation.runs import clips, read_lines
from evaluation.runs.lines import LineFormat
from evaluation.tasks import metrics


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r"lines\.jsonl:1: not JSON"),
        ("[1]", r"lines\.jsonl:1: must be an object, not a list"),
        ('{"output": "a.png"}', "lines.jsonl:1: 'input' must be a list of paths"),
        ('{"input": [], "output": "a.png"}', "'input' must be a list"),
        ('{"input": "0.png", "output": "a.png"}', "'input' must be a list"),
        ('{"input": ["0.png", "no.png"], "output": "a.png"}', r"lines\.jsonl:1: input: no such file: .*no\.png"),
        ('{"input": ["0.png"]}', "'output' must be the path"),
        ('{"input": ["0.png"], "output": "a.txt"}', r"a\.txt: must end with one of"),
        ('{"input": ["0.png"], "output": "a.png", "target": ["1.png", "2.png"]}', "2 images in 'target', --n_new"),
        ('{"input": ["0.png"], "output": "a.png"}', "--evaluate_mse: no line of"),
        ('{"input": ["0.png"], "output": "a.png"}\n' * 2, r"lines\.jsonl:2: .*a\.png is already an output of .*:1"),
        (
            '{"input": ["0.png"], "output": "a.png"}\n{"input": ["0.png"], "output": "a_1.png"}',
            r"lines\.jsonl:2: .*a_1\.png is already an output of .*:1",
        ),
        ("\n", "has no examples"),
    ],
)
def test_bad_lines_are_named_before_a_model_is_loaded(lines, tmp_path, line, message):
    (tmp_path / "lines.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        run_main(batch_generation, **lines, checkpoint="none", output_base_dir=str(tmp_path / "o"), evaluate_mse=True)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_lines(path, LineFormat()),
        lambda path: clips.find_clips(clip_settings(read_file_list=path), 2),
        metrics.read_palette,
    ],
)
def test_a_line_that_is_not_text_is_named(tmp_path, read):
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\n\xff\xfe\n")
    with pytest.raises(UserError, match=rf"^{path}:2: not UTF-8 text \(invalid start byte at byte 0\)"):
        read(str(path))


def test_a_compressed_file_gives_the_same_lines(lines):
    path = lines["input_file"]
    with open(path, "rb") as plain, gzip.open(f"{path}.gz", "wb") as compressed:
        compressed.write(plain.read())
    line_format = LineFormat(lines["input_base_dir"], targets="required")
    expected, actual = ([line.files for line in read_lines(name, line_format)] for name in (path, f"{path}.gz"))
    assert actual == expected
