"""VQ, FSQ and LFQ as mappings between vectors and codes, against the formulas of the papers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizer_kit import TINY, random_vqgan

from EasyLM.errors import UserError
from tokenizer.vqgan import VQGANConfig, grid_vectors, weights
from tokenizer.vqgan.quantizers import Codebook

LEVELS = [(8, 5, 5, 5), (7, 4, 2)]


def fsq(*levels: int) -> VQGANConfig:
    count = int(np.prod(levels))
    return dataclasses.replace(
        TINY, quantizer="fsq", fsq_levels=levels, num_embeddings=count, quantized_embed_dim=len(levels)
    )


def lfq(bits: int) -> VQGANConfig:
    return dataclasses.replace(TINY, quantizer="lfq", num_embeddings=2**bits, quantized_embed_dim=bits)


def nearest(config: VQGANConfig, hidden) -> np.ndarray:
    """Returns the codes of vectors [B,h,w,Z]."""
    return np.asarray(jax.jit(codebook(config).nearest)(jnp.asarray(hidden, jnp.float32)))


def codebook(config: VQGANConfig) -> Codebook:
    return Codebook(config, nnx.Rngs(0))


def paper_bound(z, levels):
    """`FSQ.bound` of arXiv 2309.15505, appendix A.1."""
    levels = np.asarray(levels)
    half_l = (levels - 1) * (1 - 1e-3) / 2
    offset = np.where(np.mod(levels, 2) == 1, 0.0, 0.5)
    return np.tanh(z + np.tan(offset / half_l)) * half_l - offset


def paper_codes_to_indexes(zhat, levels):
    """`FSQ.codes_to_indexes` of the same appendix."""
    half_width = np.asarray(levels) // 2
    basis = np.concatenate([[1], np.cumprod(levels[:-1])])
    return ((zhat * half_width + half_width) * basis).sum(axis=-1)


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_is_that_of_the_paper(levels):
    z = np.random.default_rng(0).normal(size=(1, 40, 40, len(levels)), scale=2)
    bound = paper_bound(z, levels)
    expected = np.round(bound) / (np.asarray(levels) // 2)
    codes = nearest(fsq(*levels), z)
    clear = np.all(np.abs(bound - np.floor(bound) - 0.5) > 1e-4, axis=-1).reshape(codes.shape)  # of rounding
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(codes[clear], paper_codes_to_indexes(expected, levels).reshape(codes.shape)[clear])
    vectors = grid_vectors(fsq(*levels))[codes]
    np.testing.assert_allclose(vectors[clear], expected.reshape(*codes.shape, -1)[clear], atol=1e-6)
    assert len(np.unique(codes)) > 0.2 * min(np.prod(levels), codes.size)


def test_lfq_is_that_of_the_paper():
    """Equations 3 and 4 of arXiv 2310.05737: the vector of signs, and the sum of 2^i over positive dimensions."""
    z = np.random.default_rng(0).normal(size=(2, 8, 8, 10)).astype(np.float32)
    z[0, 0, 0] = 0
    codes = nearest(lfq(10), z)
    expected = sum(2**i * (z[..., i] > 0).astype(int) for i in range(10))
    np.testing.assert_array_equal(codes, expected.reshape(codes.shape))
    np.testing.assert_array_equal(grid_vectors(lfq(10))[codes].reshape(z.shape), np.where(z > 0, 1, -1))


@pytest.mark.parametrize("config", [*(fsq(*levels) for levels in LEVELS), lfq(10)])
def test_every_code_of_a_grid_has_its_own_vector(config):
    """The vectors, if not those of an encoder, are already in the box; a bounded vector has no inverse at its ends."""
    table = grid_vectors(config)
    assert table.shape == (config.num_embeddings, config.quantized_embed_dim) and table.dtype == np.float32
    assert len(np.unique(table, axis=0)) == config.num_embeddings
    assert table.min() == -1 and table.max() <= 1
    if config.quantizer == "fsq":
        np.testing.assert_array_equal(paper_codes_to_indexes(table, config.fsq_levels).round(), np.arange(len(table)))
        middle = table * (np.asarray(config.fsq_levels) // 2)  # in the units of `bound`, whose inverse follows
        levels = np.asarray(config.fsq_levels)
        half_l, offset = (levels - 1) * (1 - 1e-3) / 2, np.where(levels % 2 == 1, 0.0, 0.5)
        table = np.arctanh(np.clip((middle + offset) / half_l, -1 + 1e-6, 1 - 1e-6)) - np.tan(offset / half_l)
    np.testing.assert_array_equal(nearest(config, table[None, None])[0], np.arange(config.num_embeddings))


@pytest.mark.parametrize("config", [fsq(8, 5, 5, 5), lfq(10)])
def test_rounding_finds_the_nearest_vector_of_the_table(config):
    """A reader that searches the table of the file finds the same codes."""
    hidden = np.random.default_rng(0).normal(size=(1, 30, 30, config.quantized_embed_dim), scale=2)
    vectors = np.asarray(codebook(config).project(jnp.asarray(hidden, jnp.float32))).reshape(900, -1)
    distance = np.sum((vectors[:, None].astype(np.float64) - grid_vectors(config)[None]) ** 2, axis=-1)
    np.testing.assert_array_equal(nearest(config, hidden)[0], distance.argmin(axis=1))


def test_vectors_that_are_not_finite_have_codes():
    hidden = np.full((1, 1, 1, 4), np.nan)
    hidden[..., 0] = np.inf
    for config in (fsq(8, 5, 5, 5), lfq(4)):
        assert 0 <= nearest(config, hidden)[0, 0] < config.num_embeddings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantizer": "rq"}, "quantizer='rq': must be one of vq, fsq, lfq"),
        ({"quantizer": "fsq"}, r"fsq_levels=\(\): quantizer=fsq needs levels, such as 8,5,5,5"),
        ({"fsq_levels": [8, 5]}, r"fsq_levels=\(8, 5\): is for quantizer=fsq"),
        ({"quantizer": "fsq", "fsq_levels": [8, 1, 4, 1]}, "fsq_levels=.*: must be numbers of at least 2"),
        ({"quantizer": "fsq", "fsq_levels": [8, 4]}, "quantized_embed_dim=4: must be 2, as fsq_levels"),
        ({"quantizer": "fsq", "fsq_levels": [8, 2, 2, 2]}, "num_embeddings=32: must be 64, the product of fsq_levels"),
        ({"quantizer": "lfq"}, "num_embeddings=32: must be 16, two to the power of quantized_embed_dim"),
        ({"quantizer": "lfq", "quantized_embed_dim": 40}, "quantized_embed_dim=40: must be at most 16"),
        ({"quantizer": "lfq", "num_embeddings": 16, "normalize_codes": True}, "normalize_codes=True: is for"),
    ],
)
def test_settings_of_another_quantizer_are_refused(settings, message):
    with pytest.raises(UserError, match=f"^config.json: {message}"):
        VQGANConfig.from_dict({**dataclasses.asdict(TINY), **settings}, "config.json")


def test_files_hold_the_table_and_the_settings(tmp_path):
    """float16 files, as the trainer writes them: a third is rounded, which no code notices."""
    config = fsq(7, 5)
    model = random_vqgan(config)
    weights.save(model, tmp_path, np.float16)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["quantizer"] == "fsq" and stored["fsq_levels"] == [7, 5]
    loaded = weights.load(tmp_path)
    assert loaded.config == config
    np.testing.assert_allclose(loaded.quantize.embedding[...], grid_vectors(config), atol=1e-3)
    assert not np.array_equal(loaded.quantize.embedding[...], grid_vectors(config))

    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors["quantize.embedding.weight"][::-1].copy()
    save_file(tensors | {"quantize.embedding.weight": table}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"embedding\.weight is not the table of quantizer=fsq in "):
        weights.load(tmp_path)
