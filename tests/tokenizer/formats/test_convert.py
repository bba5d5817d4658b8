"""The command writes a folder of this project with the same settings and tensors, and what other programs read."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from hub_kit import card_metadata, connected_hub
from PIL import Image
from tokenizer_kit import TINY, run_main, tiny_vqgan, write_image

from EasyLM.errors import UserError
from tokenizer import convert, formats
from tokenizer.media import images
from tokenizer.vqgan import PRETRAINED, Codec, VQGANConfig, weights


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


@pytest.mark.slow
@pytest.mark.parametrize("pixel_range", [(0, 1), (-1, 1)])
def test_transformers_reads_images_as_the_commands_do(tmp_path, pixel_range):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, pixel_range=pixel_range)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(weights.preprocessing(config)))
    write_image(tmp_path / "image.png", seed=0, size=41)
    Image.open(tmp_path / "image.png").resize((41, 20)).save(tmp_path / "image.png")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    pixels_3HW = processor(Image.open(tmp_path / "image.png"), return_tensors="np")["pixel_values"][0]
    low, high = pixel_range
    expected_HW3 = low + (high - low) * images.load(tmp_path / "image.png", TINY.resolution)
    np.testing.assert_allclose(pixels_3HW.transpose(1, 2, 0), expected_HW3, rtol=0, atol=1e-6)


def test_the_shipped_folder_says_how_images_are_read():
    path = pathlib.Path(PRETRAINED)
    config = VQGANConfig.from_dict(json.loads((path / "config.json").read_text()))
    assert json.loads((path / "preprocessor_config.json").read_text()) == weights.preprocessing(config)


def test_the_card_and_the_upload(tmp_path, monkeypatch):
    """Of a tokenizer that a run has trained: the records of the run are beside its folder."""
    source = tiny_vqgan(tmp_path / "run" / "vqgan")
    record = {"step": 3, "vqgan_config": {}, "flags": {"input_dirs": "/home/me/photos,secret/scenes"}}
    (tmp_path / "run" / "metadata.json").write_text(json.dumps(record))
    rows = [{"step": 2, "psnr": 21.5, "codes_used": 0.25}, {"step": 3, "psnr": 22.5}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "ps')
    card = {"card__license": "mit", "card__limits": "No text."}
    with connected_hub(monkeypatch, tmp_path) as hub:
        run_main(convert, vqgan=source, output_dir=str(tmp_path / "out"), push_to_hub="Owner/vq", **card)
        with pytest.raises(UserError, match=r"^--push_to_hub=Owner/vq: the repository holds README\.md"):
            run_main(convert, vqgan=source, output_dir=str(tmp_path / "other"), push_to_hub="Owner/vq")
        assert not (tmp_path / "other" / "config.json").exists()
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name[0] != "."}
    assert set(written) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert hub.repositories["Owner/vq"].items() >= written.items() and len(hub.repositories["Owner/vq"]) == 5
    text = written["README.md"].decode()
    assert card_metadata(text)["license"] == "mit" and "\n# vq\n" in text
    for line in ("| psnr | 21.5 |", "| codes | 32 |", "Folders: photos, scenes.", f"| {Codec(source).digest} |"):
        assert line in text
    assert "/home" not in text and "secret" not in text and "22.5" not in text and "not stated" not in text.lower()


def test_a_card_that_is_there_is_kept_and_what_nobody_says_is_not_stated(tmp_path):
    source = tiny_vqgan(tmp_path / "vq")
    run_main(convert, vqgan=source, output_dir=str(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").read_text().count("Not stated.") == 4  # licence, data, figures, limits
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    run_main(convert, vqgan=source, output_dir=str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    with pytest.raises(UserError, match=f"^--card.data=Photos.: {tmp_path}/mine/README.md is a card of your own"):
        (tmp_path / "mine" / "config.json").unlink()
        run_main(convert, vqgan=source, output_dir=str(tmp_path / "mine"), card__data="Photos.")


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "preprocessor_config.json", "config.json"])
def test_a_killed_conversion_is_completed_by_the_next(tmp_path, monkeypatch, name):
    """It is killed before it writes one of its files."""
    source, out = tiny_vqgan(tmp_path / "vq"), tmp_path / "out"
    atomic_file = convert.atomic_file

    def killed(path):
        if str(path) == f"{out}/{name}":
            raise KeyboardInterrupt
        return atomic_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "atomic_file", killed)
        patch.setattr(weights, "atomic_file", killed)
        patch.setattr("EasyLM.storage.atomic.atomic_file", killed)  # of write_json
        with pytest.raises(KeyboardInterrupt):
            run_main(convert, vqgan=source, output_dir=str(out))
    run_main(convert, vqgan=source, output_dir=str(out), card__license="mit")
    assert {path.name for path in out.iterdir() if path.name[0] != "."} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert "license" in card_metadata((out / "README.md").read_text())


def test_errors_name_the_flag(tmp_path):
    with pytest.raises(UserError, match=f"^--vqgan={tmp_path}: .*no tokenizer"):
        run_main(convert, vqgan=str(tmp_path), output_dir=str(tmp_path / "ours"))
    with pytest.raises(UserError, match="must be a local path"):
        run_main(convert, output_dir="gs://bucket/ours")
    with pytest.raises(UserError, match=r"^--card\.license=My own: must be a name of the Hub"):
        run_main(convert, output_dir=str(tmp_path / "ours"), card__license="My own")
    with pytest.raises(UserError, match=r"^--push_to_hub=mine: must be OWNER/NAME"):
        run_main(convert, output_dir=str(tmp_path / "ours"), push_to_hub="mine")
    assert not (tmp_path / "ours" / "config.json").exists()
