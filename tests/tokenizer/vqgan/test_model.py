"""The network equals open-muse on reference data and torch on random weights, and has the released shapes."""

import ast
import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tokenizer_kit import TINY, random_vqgan, tiny_vqgan

from EasyLM.errors import UserError
from tokenizer.vqgan import VQGAN, VQGANConfig, weights


class UsedNames(dict):
    """A dictionary that keeps the names that are asked for."""

    def __init__(self, values):
        super().__init__(values)
        self.used = set()

    def __getitem__(self, name):
        self.used.add(name)
        return super().__getitem__(name)


@pytest.mark.slow
def test_reference_data_of_open_muse_is_reproduced(golden):
    pytest.importorskip("torch")
    model = weights.load(golden / "vqgan_small")
    reference = np.load(golden / "vqgan_small" / "golden.npz")
    hidden, codes = nnx.jit(lambda model, pixels: model.encode(pixels))(model, reference["pixel_values"])
    decoded = nnx.jit(lambda model, codes: model.decode(codes))(model, reference["codes"])
    np.testing.assert_allclose(hidden, reference["hidden"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(codes, reference["codes"])
    np.testing.assert_allclose(decoded, reference["decoded"], rtol=0, atol=1e-3)


def test_default_config_has_the_released_shapes(golden):
    model = nnx.eval_shape(lambda: VQGAN(VQGANConfig(), rngs=nnx.Rngs(0)))
    shapes = {weights.file_name(p): list(weights.file_shape(leaf)) for p, leaf in weights.flat_parameters(model)}
    assert shapes == json.loads((golden / "vqgan_released_shapes.json").read_text())
    assert VQGANConfig().tokens_per_image == 256


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, attn_resolutions=(8, 16), num_res_blocks=2),
        dataclasses.replace(TINY, resample_with_conv=True, attn_resolutions=(8, 16), num_res_blocks=2),
        dataclasses.replace(  # as LlamaGen's
            TINY,
            attn_resolutions=(8,),
            no_attn_mid_block=False,
            pixel_range=(-1, 1),
            normalize_codes=True,
            skip_single_attention=False,
        ),
        dataclasses.replace(TINY, quantizer="fsq", fsq_levels=(8, 5, 5), num_embeddings=200, quantized_embed_dim=3),
        dataclasses.replace(TINY, quantizer="lfq", num_embeddings=1024, quantized_embed_dim=10),
    ],
)
def test_torch_gives_equal_results_from_our_files(tmp_path, config):
    torch = pytest.importorskip("torch")
    from torch_vqgan import TorchVQGAN

    model = random_vqgan(config)
    weights.save(model, tmp_path)
    torch_model = TorchVQGAN(tmp_path)
    torch_model.tensors = UsedNames(torch_model.tensors)
    pixels = np.random.default_rng(1).random((2, 16, 16, 3), np.float32)
    low, high = config.pixel_range
    network_pixels = torch.tensor(low + (high - low) * pixels).permute(0, 3, 1, 2)
    hidden, codes = torch_model.vectors(network_pixels), torch_model.encode(network_pixels)
    decoded = torch_model.decode(codes).permute(0, 2, 3, 1)
    assert torch_model.tensors.used == set(load_file(tmp_path / "model.safetensors")), "each tensor has an effect"
    ours = nnx.jit(lambda model, pixels: model.encode(pixels))(model, pixels)
    np.testing.assert_allclose(ours[0], hidden, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(ours[1], codes)
    pixels = nnx.jit(lambda model, codes: model.decode(codes))(model, np.asarray(codes, np.int32))
    np.testing.assert_allclose(np.clip(pixels, 0, 1), decoded, rtol=0, atol=1e-5)
    assert len(np.unique(codes)) > 2 and decoded.std() > 0


@pytest.mark.slow
def test_the_program_of_the_document_runs(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    document = (pathlib.Path(__file__).parents[3] / "docs/serve_elsewhere.md").read_text()
    program = next(part for part in re.findall(r"```python\n(.*?)```", document, re.DOTALL) if "TorchVQGAN" in part)
    tiny_vqgan(tmp_path / "DIR")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(program, names)
    pixels = names["pixels"]
    assert pixels.shape == (2, 3, TINY.resolution, TINY.resolution) and pixels.std() > 0
    assert pixels.min() >= 0 and pixels.max() <= 1


def test_the_torch_program_needs_torch_and_safetensors_alone():
    tree = ast.parse((pathlib.Path(__file__).parents[3] / "scripts/torch_vqgan.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"json", "pathlib", "safetensors.torch", "torch", "torch.nn"}


def test_codes_are_the_nearest_vectors_row_by_row(tiny, pixels):
    model = weights.load(tiny)
    hidden, codes = nnx.jit(lambda model, pixels: model.encode(pixels))(model, pixels[:2])
    table = np.asarray(model.quantize.embedding[...])
    distance = np.sum((np.asarray(hidden).reshape(2, -1, 1, table.shape[1]) - table) ** 2, axis=-1)
    np.testing.assert_array_equal(codes, distance.argmin(-1))
    assert codes.shape == (2, TINY.tokens_per_image)
    assert len(np.unique(codes)) > 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 18, "channel_mult": (1, 2, 4)}, "resolution=18: must be divisible by 4"),
        ({"num_embeddings": 65537}, r"num_embeddings=65537: must be 1\.\.65536"),
        ({"pixel_range": (0, 255)}, r"pixel_range=\(0, 255\): must be \[0, 1\] or \[-1, 1\]"),
        ({"hidden_channels": 48}, "hidden_channels=48: .*norm_groups=32"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"num_res_blocks": 10**9}, r"num_res_blocks=1000000000: must be 1\.\.65536"),
        ({"channel_mult": (1,) * 13}, "channel_mult=.*: must have at most 12 levels"),
        ({"channel_mult": (1, 10**6)}, "channel_mult=.*: gives more than 65536 channels"),
        ({"channel_mult": "12"}, "config: channel_mult must be a list, not a text"),
        ({"channel_mult": (1, None)}, r"config: channel_mult\[1\] must be an integer, not null"),
        ({"resolution": 64.0}, "config: resolution must be an integer, not a number"),
        ({"resolution": "large"}, "config: resolution must be an integer, not a text"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        VQGANConfig.from_dict(settings)
