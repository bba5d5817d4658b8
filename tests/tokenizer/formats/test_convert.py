"""The command writes a folder of this project with the same settings and tensors."""

import json

import numpy as np
import pytest
from tokenizer_kit import run_main

from EasyLM.errors import UserError
from tokenizer import convert, formats
from tokenizer.vqgan import VQGANConfig


def test_converted_folder_is_the_same_tokenizer(golden, tmp_path, capsys):
    source = golden / "vq_llamagen_small" / "vq.pt"
    run_main(convert, vqgan=str(source), resolution=64, output_dir=str(tmp_path / "ours"))
    assert "512 codes; images of 64 pixels a side, 256 tokens each" in capsys.readouterr().out
    expected, written = formats.read(source, 64), formats.read(tmp_path / "ours")
    assert VQGANConfig.from_dict(written.settings) == VQGANConfig.from_dict(expected.settings)
    assert written.tensors.keys() == expected.tensors.keys()
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(written.tensors[name], array, err_msg=name)
    own_settings = {"pixel_range": [-1, 1], "normalize_codes": True, "skip_single_attention": False}
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {name: config.get(name) for name in own_settings} == own_settings
    with pytest.raises(UserError, match=f"^--output_dir={tmp_path}/ours: already holds a model"):
        run_main(convert, vqgan=str(source), output_dir=str(tmp_path / "ours"))


def test_errors_name_the_flag(tmp_path):
    with pytest.raises(UserError, match=f"^--vqgan={tmp_path}: .*no tokenizer"):
        run_main(convert, vqgan=str(tmp_path), output_dir=str(tmp_path / "ours"))
    with pytest.raises(UserError, match="must be a local path"):
        run_main(convert, output_dir="gs://bucket/ours")
