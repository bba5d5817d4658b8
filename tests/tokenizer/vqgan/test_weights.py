"""Released files and our own load completely; errors name invalid files."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizer_kit import TINY

from EasyLM.errors import UserError
from tokenizer import formats
from tokenizer.formats.architecture import Translated
from tokenizer.vqgan import Codec, VQGANConfig, weights


@pytest.mark.slow
def test_the_digest_names_what_determines_the_codes(tiny, tmp_path):
    """Not the decoder, the format of the file, or how the model was trained."""
    digest = Codec(tiny).digest
    assert len(digest) == 16 and Codec(tiny).digest == digest
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")  # by another program, without checksums
    assert Codec(str(tmp_path)).digest == digest

    for name in ("decoder.conv_in.bias", "post_quant_conv.bias", "encoder.conv_in.bias", "quantize.embedding.weight"):
        array = tensors[name].copy()
        array.flat[0] += 1
        save_file(tensors | {name: array}, tmp_path / "model.safetensors")
        determines = name.startswith(("encoder", "quantize"))
        assert (Codec(str(tmp_path)).digest != digest) == determines, name
    save_file(tensors, tmp_path / "model.safetensors")
    for change, determines in (({"commitment_cost": 9.0}, False), ({"resolution": 32}, True)):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert (Codec(str(tmp_path)).digest != digest) == determines, change


def test_a_flipped_bit_is_found(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors: the array .* is damaged"):
        weights.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(data) * 2)
    with pytest.raises(UserError, match=r"model\.safetensors: not a complete safetensors file"):
        weights.load(tmp_path)


@pytest.mark.slow
def test_released_tensors_load_into_their_parameters(golden, monkeypatch):
    shapes = json.loads((golden / "vqgan_released_shapes.json").read_text())
    constants = {name: np.broadcast_to(np.float16(i), shape) for i, (name, shape) in enumerate(shapes.items())}
    translated = Translated(dataclasses.asdict(VQGANConfig()), dict(constants), "released", "config.json")
    monkeypatch.setattr(weights.formats, "read", lambda path, resolution: translated)
    model = weights.load("released")
    loaded = {weights.file_name(p): float(leaf.get_value().ravel()[0]) for p, leaf in weights.flat_parameters(model)}
    assert loaded == {name: float(i) for i, name in enumerate(shapes)}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_released_files_of_full_size_load(golden, tmp_path, form):
    """Each tensor contains its own number, so a misplaced tensor is detected."""
    shapes = json.loads((golden / "vqgan_released_shapes.json").read_text())
    tensors = {name: np.full(shape, i, np.float16) for i, (name, shape) in enumerate(shapes.items())}
    config = dataclasses.asdict(VQGANConfig())
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQGANModel", **config}))
    if form == "bin":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.tensor(array) for name, array in tensors.items()}, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    loaded = {weights.file_name(p): leaf.get_value() for p, leaf in weights.flat_parameters(weights.load(tmp_path))}
    assert loaded.keys() == shapes.keys()
    for name, array in tensors.items():
        assert loaded[name].size == array.size and np.all(loaded[name] == array.flat[0]), name


def test_torch_tensors_are_bit_equal_after_load_and_save(golden, tmp_path):
    torch = pytest.importorskip("torch")
    source = torch.load(golden / "vqgan_small" / "pytorch_model.bin", weights_only=True)
    weights.save(weights.load(golden / "vqgan_small"), tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == source.keys()
    for name, tensor in source.items():
        np.testing.assert_array_equal(written[name], tensor.numpy(), err_msg=name)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, golden / "vqgan_small"))
    assert {name: ours[name] for name in theirs if not name.startswith("_")} == {
        name: value for name, value in theirs.items() if not name.startswith("_")
    }


def test_save_and_load_are_inverse(tiny, tmp_path):
    model = weights.load(tiny)
    weights.save(model, tmp_path)
    again = weights.load(tmp_path)
    assert again.config == model.config == TINY
    for (path, one), (_, other) in zip(weights.flat_parameters(model), weights.flat_parameters(again), strict=True):
        np.testing.assert_array_equal(one.get_value(), other.get_value(), err_msg=str(path))


def test_half_precision_files_load_as_float32(tiny, tmp_path):
    weights.save(weights.load(tiny), tmp_path, np.float16)
    assert all(array.dtype == np.float16 for array in load_file(tmp_path / "model.safetensors").values())
    assert all(leaf.get_value().dtype == np.float32 for _, leaf in weights.flat_parameters(weights.load(tmp_path)))


def _drop(tensors):
    del tensors["encoder.conv_in.bias"]


def _add(tensors):
    tensors["discriminator.weight"] = np.zeros(1, np.float32)


def _reshape(tensors):
    tensors["encoder.conv_in.bias"] = np.zeros(7, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"missing keys: encoder\.conv_in\.bias"),
        (_add, r"unexpected keys: discriminator\.weight"),
        (_reshape, r"encoder\.conv_in\.bias has shape \(7,\)"),
    ],
)
def test_invalid_tensors_are_named(tiny, tmp_path, change, message):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        weights.load(tmp_path)


class RunsCommand:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("wrapped", [False, True])
def test_torch_files_that_run_code_are_rejected(tiny, tmp_path, monkeypatch, wrapped):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    shutil.copy(os.path.join(tiny, "config.json"), tmp_path)
    torch.save({"encoder.conv_in.bias": RunsCommand()} if wrapped else RunsCommand(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: not a file of tensors"):
        weights.load(tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_files_of_two_models_are_rejected(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({"encoder.conv_in.bias": tensors["encoder.conv_in.bias"] + 1}, tmp_path / "older.safetensors")
    with pytest.raises(UserError, match=r"/model\.safetensors and .*/older\.safetensors both contain encoder\."):
        weights.load(tmp_path)
    names = set(tensors)
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert set(formats.read(tmp_path).tensors) == names  # shards of one model


def test_incomplete_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}: no tokenizer: a folder has config.json and weights, "):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        weights.load(tmp_path)
    with pytest.raises(UserError, match=f"^--vqgan={tmp_path}: .*no weights"):
        Codec(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"config.json: a model of transformers \(llama\), not a tokenizer$"):
        weights.load(tmp_path)
