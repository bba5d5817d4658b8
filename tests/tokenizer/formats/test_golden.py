"""Tokenizers of LlamaGen and taming-transformers give the results of these projects (tests/golden/README.md)."""

import json

import numpy as np
import pytest
from flax import nnx

from tokenizer import formats
from tokenizer.formats import llamagen
from tokenizer.vqgan import Codec, VQGANConfig, weights

FOLDERS = {"vq_llamagen_small": 64, "vq_taming_small": 0}  # with --resolution


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_reference_data_is_reproduced(golden, tmp_path, name):
    reference = np.load(golden / name / "golden.npz")
    model = weights.load(golden / name, resolution=FOLDERS[name])
    hidden, codes = nnx.jit(lambda model, pixels: model.encode(pixels))(model, reference["pixel_values"])
    decoded = nnx.jit(lambda model, codes: model.decode(codes))(model, reference["codes"])
    np.testing.assert_allclose(hidden, reference["hidden"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(codes, reference["codes"])
    np.testing.assert_allclose(decoded, reference["decoded"], rtol=0, atol=1e-3)

    weights.save(model, tmp_path)
    codec = Codec(str(tmp_path))
    assert codec.digest == weights.digest(model)
    assert (codec.num_codes, codec.tokens_per_image, codec.pixel_range) == (len(model.quantize.embedding), 256, (-1, 1))
    np.testing.assert_array_equal(codec.encode(reference["pixel_values"]), reference["codes"])
    np.testing.assert_allclose(codec.decode(reference["codes"]), np.clip(decoded, 0, 1), rtol=0, atol=1e-5)


def _config(path, resolution=0) -> VQGANConfig:
    translated = formats.read(path, resolution)
    return VQGANConfig.from_dict(translated.settings, translated.config)


def test_settings_follow_from_files(golden):
    config = _config(golden / "vq_llamagen_small" / "vq.pt", 64)
    network = {"hidden_channels": 32, "channel_mult": (1, 2, 2), "attn_resolutions": (16,), "no_attn_mid_block": False}
    other = {"z_channels": 32, "pixel_range": (-1, 1), "skip_single_attention": False}
    assert config == VQGANConfig(
        resolution=64, num_embeddings=512, quantized_embed_dim=8, normalize_codes=True, **network, **other
    )
    config = _config(golden / "vq_taming_small" / "last.ckpt")
    assert config == VQGANConfig(
        resolution=64, num_embeddings=256, quantized_embed_dim=16, num_res_blocks=1, **network, **other
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_another_resolution_keeps_the_levels_of_attention(golden, name):
    """A file of LlamaGen does not say its resolution, so it is 256."""
    side = 256 if name == "vq_llamagen_small" else 64
    assert _config(golden / name).resolution == side
    config = _config(golden / name, 128)
    assert (config.resolution, config.attn_resolutions, config.tokens_per_image) == (128, (32,), 32 * 32)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("VQ_16", 16), ("VQ_8", 32)])
def test_layouts_of_full_size_load_whole(golden, monkeypatch, name, side):
    """Each tensor contains its own number, so a tensor that is lost or misplaced is detected."""
    shapes = json.loads((golden / "llamagen_shapes.json").read_text())[name]
    tensors = {tensor: np.broadcast_to(np.float32(i), shape) for i, (tensor, shape) in enumerate(shapes.items())}
    tensors.pop("quantize.codebook_used")
    monkeypatch.setattr(llamagen, "read_tensors", lambda path, ignored: dict(tensors))
    translated = llamagen.read([golden / "vq_ds.pt"], 0)
    monkeypatch.setattr(weights.formats, "read", lambda path, resolution: translated)
    model = weights.load("vq_ds.pt")
    assert (model.config.tokens_per_image, model.config.num_embeddings) == (side**2, 16384)
    loaded = [float(leaf.get_value().ravel()[0]) for _, leaf in weights.flat_parameters(model)]
    assert sorted(loaded) == sorted(float(tensor.flat[0]) for tensor in tensors.values())
    finest = {"encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"}
    assert {translated.tensors[key].shape[0] for key in finest} == {128}


def test_numbers_of_levels_are_translated(golden):
    """LlamaGen numbers the levels of the decoder from the coarsest."""
    source = formats.read_tensors(golden / "vq_llamagen_small" / "vq.pt")
    ours = formats.read(golden / "vq_llamagen_small", 64).tensors
    pairs = {
        "decoder.up.0.block.2.conv1.weight": "decoder.conv_blocks.2.res.2.conv1.weight",
        "decoder.up.2.attn.1.q.bias": "decoder.conv_blocks.0.attn.1.q.bias",
        "encoder.down.2.attn.0.norm.weight": "encoder.conv_blocks.2.attn.0.norm.weight",
        "encoder.mid.attn_1.proj_out.weight": "encoder.mid.1.proj_out.weight",
        "decoder.mid.block_2.norm1.bias": "decoder.mid.2.norm1.bias",
        "decoder.up.1.upsample.conv.weight": "decoder.conv_blocks.1.upsample.conv.weight",
    }
    for name, original in pairs.items():
        np.testing.assert_array_equal(ours[name], source[original], err_msg=name)
