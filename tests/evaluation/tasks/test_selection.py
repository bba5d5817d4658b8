"""Flags that select tasks are validated before the model is loaded."""

import re
import shutil
import sys

import pytest
from fewshot_kit import write_pairs
from tokenizer_kit import run_main

from EasyLM.errors import UserError
from evaluation import fewshot


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "--input_dirs .required unless --clip_dirs or --benchmark is given., --target_dirs .* are missing"),
        ({"input_dirs": "a,b", "target_dirs": "c"}, "--target_dirs has 1 folders, --input_dirs 2"),
        ({"input_dirs": "a"}, "--target_dirs .required unless --clip_dirs or --benchmark is given. is missing"),
        ({"input_dirs": "a", "clip_dirs": "b"}, "--target_dirs has 0 folders, --input_dirs 1"),
        ({"clip_dirs": "a", "n_context_frames": "0,2"}, "--n_context_frames=0,2: must be at least 1"),
        ({"clip_dirs": "a", "n_shots": "few"}, "--n_shots=few: must be a comma list of integers"),
        ({"input_dirs": "a", "target_dirs": "b", "figures": "iou"}, "--figures='iou': choose one of 'scene_iou'"),
        ({"benchmark": "rendered", "tasks": "depht"}, "--tasks='depht': choose one of 'segmentation', 'depth'"),
        ({"benchmark": "pascal_detection", "data_dir": "/none", "fold": 4}, r"--fold=4: must be 0\.\.3"),
        (
            {"input_dirs": "a", "target_dirs": "b", "figures": "palette_iou"},
            "--figures=palette_iou: --palette is missing",
        ),
        ({"clip_dirs": "a", "depth_range": "2"}, "--depth_range=2: must be near,far"),
        ({"clip_dirs": "a", "depth_range": "0,5"}, "--depth_range=0,5: must be near,far"),
        ({"clip_dirs": "a", "depth_range": "3,3"}, "--depth_range=3,3: must be near,far"),
        ({"clip_dirs": "a", "palette": "/none"}, "--palette: /none: no such file"),
        ({"clip_dirs": "a", "rows_per_task": 0}, "--rows_per_task=0: must be at least 1"),
        ({"clip_dirs": "a", "seed": -1}, r"seed=-1: must be 0\.\.2147483647"),
        ({"clip_dirs": "a", "seed": 2**63}, "seed=9223372036854775808: must be"),
    ],
)
def test_invalid_settings_are_named(values, message):
    with pytest.raises(UserError, match=message):
        run_main(fewshot, **{"checkpoint": "none", **values})


@pytest.mark.parametrize("name, extension", [("json", "json"), ("plot", "png"), ("picture", "png")])
def test_unwritable_outputs_are_named_before_the_model_is_loaded(tmp_path, name, extension):
    (tmp_path / "file").write_text("not a folder")
    output = {f"output_{name}": f"{tmp_path}/file/x.{extension}"}
    with pytest.raises(UserError, match=rf"--output_{name}=.*/file/x\.{extension}: cannot be written"):
        run_main(fewshot, checkpoint="none", benchmark="rendered", **output)


def test_missing_matplotlib_is_named_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="--output_plot needs the package matplotlib"):
        run_main(fewshot, benchmark="rendered", output_plot=f"{tmp_path}/x.png", checkpoint="none")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"target_dirs": "{0}/other,{0}/b/other"}, "--target_dirs={0}/other and --target_dirs={0}/b/other: two tasks"),
        ({"clip_dirs": "{0}/b/other"}, "--target_dirs={0}/other and --clip_dirs={0}/b/other: two tasks named 'other'"),
    ],
)
def test_two_tasks_with_one_name_are_rejected_before_the_model_is_loaded(tmp_path, flags, message):
    write_pairs(tmp_path, 1)
    shutil.copytree(tmp_path / "other", tmp_path / "b" / "other")
    settings = {"target_dirs": "{0}/other"} | flags
    settings["input_dirs"] = ",".join(["{0}/image"] * len(settings["target_dirs"].split(",")))
    with pytest.raises(UserError, match=re.escape(message.format(tmp_path))):
        run_main(fewshot, checkpoint="none", **{name: value.format(tmp_path) for name, value in settings.items()})
