"""The VQGAN: equal to open-muse's on reference data, of the released shapes, the same after saving, on any devices."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizer_kit import TINY, random_vqgan, smooth_picture, tiny_vqgan

from EasyLM.errors import UserError
from tokenizer.synthetic import scenes
from tokenizer.vqgan import codec as codec_module
from tokenizer.vqgan import weights
from tokenizer.vqgan.codec import Codec
from tokenizer.vqgan.model import VQGAN, Codebook, VQGANConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_vqgan(tmp_path_factory.mktemp("vqgan"))


@pytest.fixture(scope="module")
def pictures():
    return np.stack([smooth_picture(100 + seed, TINY.resolution) for seed in range(11)]) / np.float32(255)


def test_equals_open_muse(golden):
    pytest.importorskip("torch")
    model = weights.load(golden / "vqgan_small")
    reference = np.load(golden / "vqgan_small" / "golden.npz")
    hidden, codes = nnx.jit(lambda model, pixels: model.encode(pixels))(model, reference["pixel_values"])
    decoded = nnx.jit(lambda model, codes: model.decode(codes))(model, reference["codes"])
    np.testing.assert_allclose(hidden, reference["hidden"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(codes, reference["codes"])
    np.testing.assert_allclose(decoded, reference["decoded"], rtol=0, atol=1e-3)


def test_the_released_model_has_the_released_shapes(golden):
    model = nnx.eval_shape(lambda: VQGAN(VQGANConfig(), rngs=nnx.Rngs(0)))
    shapes = {weights.file_name(p): list(weights.file_shape(leaf)) for p, leaf in weights.flat_parameters(model)}
    assert shapes == json.loads((golden / "vqgan_released_shapes.json").read_text())
    assert VQGANConfig().tokens_per_image == 256


def test_the_released_weights_load_whole(golden, monkeypatch):
    shapes = json.loads((golden / "vqgan_released_shapes.json").read_text())
    zeros = {name: np.broadcast_to(np.float16(i), shape) for i, (name, shape) in enumerate(shapes.items())}
    monkeypatch.setattr(weights, "read_config", lambda directory: VQGANConfig())
    monkeypatch.setattr(weights, "_read_directory", lambda directory: ("released", dict(zeros)))
    model = weights.load("released")
    found = {weights.file_name(p): float(leaf.get_value().ravel()[0]) for p, leaf in weights.flat_parameters(model)}
    assert found == {name: float(i) for i, name in enumerate(shapes)}  # each tensor once, where it belongs


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_released_files_load_whole(golden, tmp_path, form):
    """Real files of full size; each tensor holds its own number, so every key is seen to be used where it belongs."""
    shapes = json.loads((golden / "vqgan_released_shapes.json").read_text())
    made = {name: np.full(shape, i, np.float16) for i, (name, shape) in enumerate(shapes.items())}
    config = dataclasses.asdict(VQGANConfig())
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQGANModel", **config}))
    if form == "bin":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.tensor(array) for name, array in made.items()}, tmp_path / "pytorch_model.bin")
    else:
        save_file(made, tmp_path / "model.safetensors")
    found = {weights.file_name(p): leaf.get_value() for p, leaf in weights.flat_parameters(weights.load(tmp_path))}
    assert found.keys() == shapes.keys()
    for name, array in made.items():
        assert found[name].size == array.size and np.all(found[name] == array.flat[0]), name


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, attn_resolutions=(8, 16), num_res_blocks=2),
        dataclasses.replace(TINY, resample_with_conv=True, attn_resolutions=(8, 16), num_res_blocks=2),
    ],
)
def test_our_files_are_open_muses(tmp_path, config):
    torch = pytest.importorskip("torch")
    from torch_vqgan import TorchVQGAN

    model = random_vqgan(config)
    weights.save(model, tmp_path)
    peer = TorchVQGAN(weights.read_config(tmp_path)).eval()
    peer.load_state_dict(
        {name: torch.tensor(array) for name, array in load_file(tmp_path / "model.safetensors").items()}
    )
    pixels = np.random.default_rng(1).random((2, 16, 16, 3), np.float32)
    with torch.no_grad():
        hidden, codes = peer.encode(torch.tensor(pixels))
        decoded = peer.decode(codes)
    ours = nnx.jit(lambda model, pixels: model.encode(pixels))(model, pixels)
    np.testing.assert_allclose(ours[0], hidden, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(ours[1], codes)
    drawn = nnx.jit(lambda model, codes: model.decode(codes))(model, np.asarray(codes, np.int32))
    np.testing.assert_allclose(drawn, decoded, rtol=0, atol=1e-5)
    assert len(np.unique(codes)) > 2


def test_a_torch_file_survives_the_way_through_ours(golden, tmp_path):
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


def test_codes_equally_near_or_not_finite_stay_in_range():
    codebook = random_vqgan(TINY).quantize
    codebook.embedding[...] = codebook.embedding[...].at[5].set(codebook.embedding[...][3])
    hidden_1hwZ = codebook.embedding[...][3][None, None, None]
    assert codebook.nearest(hidden_1hwZ) == 3
    assert 0 <= int(codebook.nearest(hidden_1hwZ * np.nan)[0, 0]) < TINY.num_embeddings


@pytest.mark.parametrize("codes", [5, 32, 37, 96])
def test_the_nearest_code_is_found_whatever_their_number(codes):
    codebook = Codebook(dataclasses.replace(TINY, num_embeddings=codes), nnx.Rngs(0))
    table_KZ = np.random.default_rng(0).normal(size=codebook.embedding.shape).astype(np.float32)
    codebook.embedding[...] = jnp.asarray(table_KZ)
    hidden_1hwZ = np.random.default_rng(1).normal(size=(1, 20, 20, table_KZ.shape[1])).astype(np.float32)
    found_N = codebook.nearest(jnp.asarray(hidden_1hwZ))[0]
    distance_NK = ((hidden_1hwZ.reshape(400, 1, -1).astype(np.float64) - table_KZ) ** 2).sum(-1)
    np.testing.assert_array_equal(found_N, distance_NK.argmin(-1))
    assert len(np.unique(found_N)) > 4


def test_saving_and_loading_changes_nothing(tiny, tmp_path):
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


def test_codes_are_the_nearest_vectors_row_by_row(tiny, pictures):
    model = weights.load(tiny)
    hidden, codes = nnx.jit(lambda model, pixels: model.encode(pixels))(model, pictures[:2])
    table = np.asarray(model.quantize.embedding[...])
    distance = np.sum((np.asarray(hidden).reshape(2, -1, 1, table.shape[1]) - table) ** 2, axis=-1)
    np.testing.assert_array_equal(codes, distance.argmin(-1))
    assert codes.shape == (2, TINY.tokens_per_image)
    assert len(np.unique(codes)) > 8


def test_batch_size_devices_and_cores_change_no_code(tiny, pictures, monkeypatch):
    assert jax.device_count() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    codec = Codec(tiny, batch_size=8)  # two pictures a device; the batch is partial
    codes = codec.encode(pictures)
    other = Codec(tiny, batch_size=7, devices=jax.devices()[:1])
    assert other.batch_size == 8, "a device that is a CPU takes a piece for each core"
    np.testing.assert_array_equal(other.encode(pictures), codes)
    # float32 rounding through twenty layers (1.3e-6 was seen); one level of 8 bits is 4e-3
    np.testing.assert_allclose(other.decode(codes), codec.decode(codes), rtol=0, atol=1e-5)
    assert codec.encode(pictures[:0]).shape == (0, TINY.tokens_per_image)
    monkeypatch.setattr(codec_module, "_PIXELS", 2 * TINY.resolution**2)  # pieces of two pictures, more than cores
    pieces = Codec(tiny, batch_size=11, devices=jax.devices()[:1])
    assert pieces.batch_size == 12
    np.testing.assert_array_equal(pieces.encode(pictures), codes)


def test_the_next_batch_is_under_way_before_a_result_is_taken(tiny, pictures):
    codec = Codec(tiny, batch_size=8)
    asked = []

    def batches():
        for part in (pictures[:8], pictures[8:], pictures[:3]):
            asked.append(len(part))
            yield part

    results = codec.encode_batches(batches())
    first = next(results)
    assert asked == [8, 3]
    np.testing.assert_array_equal(np.concatenate([first, *results]), codec.encode(pictures)[[*range(11), 0, 1, 2]])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_batch_size_changes_no_code_of_the_shipped_tokenizer(dtype):
    """A picture that is computed alone may have other codes than one of several: in bfloat16 some of these do."""
    pixels = np.stack([view for seed in range(60) for view in scenes.scene(seed, 32).values()]).astype(np.float32) / 255
    codes = Codec(dtype=dtype).encode(pixels)
    one = jax.devices()[:1]
    for batch_size, devices in ((1, None), (1, one), (3, one), (16, one)):
        found = Codec(dtype=dtype, batch_size=batch_size, devices=devices).encode(pixels)
        np.testing.assert_array_equal(found, codes, err_msg=f"{batch_size} {devices}")


@pytest.mark.slow
def test_bf16_stays_near_float32(tiny, pictures):
    codes = Codec(tiny).encode(pictures)
    difference = Codec(tiny, "bf16").decode(codes) - Codec(tiny).decode(codes)
    assert 0 < np.abs(difference).max() < 0.1


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
def test_wrong_weights_are_named(tiny, tmp_path, change, message):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        weights.load(tmp_path)


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_torch_file_that_would_run_something_is_refused(tiny, tmp_path, monkeypatch, wrapped):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    shutil.copy(os.path.join(tiny, "config.json"), tmp_path)
    torch.save({"encoder.conv_in.bias": Evil()} if wrapped else Evil(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: not a file of tensors"):
        weights.load(tmp_path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 18, "channel_mult": (1, 2, 4)}, "resolution=18: must be divisible by 4"),
        ({"num_embeddings": 8193}, r"num_embeddings=8193: must be 1\.\.8192"),
        ({"hidden_channels": 48}, "hidden_channels=48: .*norm_groups=32"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"resolution": "large"}, "wrong type"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        VQGANConfig.from_dict(settings)


def test_files_of_two_models_are_no_mixture(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({"encoder.conv_in.bias": tensors["encoder.conv_in.bias"] + 1}, tmp_path / "older.safetensors")
    with pytest.raises(UserError, match=r"/model\.safetensors and .*/older\.safetensors both hold encoder\."):
        weights.load(tmp_path)
    names = set(tensors)
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert set(weights._read_directory(tmp_path)[1]) == names  # parts of one


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        weights.load(tmp_path)
