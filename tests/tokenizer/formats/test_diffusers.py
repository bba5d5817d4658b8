"""A random VQModel of diffusers gives diffusers' results. Needs the package diffusers."""

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from EasyLM.errors import UserError
from tokenizer import formats
from tokenizer.vqgan import weights

SETTINGS = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 1,
    "latent_channels": 6,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 48,
    "norm_num_groups": 8,
    "sample_size": 16,
}


@pytest.fixture(scope="module")
def peer():
    """The model of diffusers. Vectors of the encoder are its codes, so that many codes are used."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    torch.manual_seed(0)
    model = diffusers.VQModel(**SETTINGS).eval()
    with torch.no_grad():
        vectors = model.encode(torch.rand(4, 3, 16, 16) * 2 - 1).latents.permute(0, 2, 3, 1).reshape(-1, 4)
        model.quantize.embedding.weight.copy_(vectors[:: len(vectors) // 48][:48])
    return model


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    path = tmp_path_factory.mktemp("diffusers")
    peer.save_pretrained(path)
    return path


@pytest.mark.slow
def test_results_are_those_of_diffusers(peer, folder):
    import torch

    pixels = np.random.default_rng(0).random((3, 16, 16, 3), np.float32)
    with torch.no_grad():
        latents = peer.encode(torch.tensor(pixels).permute(0, 3, 1, 2) * 2 - 1).latents
        _, _, (_, _, codes) = peer.quantize(latents)
        decoded = peer.decode(latents).sample.permute(0, 2, 3, 1) / 2 + 0.5
    model = weights.load(folder)
    hidden, ours = nnx.jit(lambda model, pixels: model.encode(pixels))(model, pixels)
    np.testing.assert_allclose(hidden, latents.permute(0, 2, 3, 1), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(ours, codes.reshape(3, -1))
    assert len(np.unique(codes)) > 12
    pixels = nnx.jit(lambda model, codes: model.decode(codes))(model, ours)
    np.testing.assert_allclose(pixels, decoded, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_bin_files_and_old_names_of_attention_are_the_same_model(peer, folder, tmp_path):
    peer.save_pretrained(tmp_path, safe_serialization=False)
    expected = formats.read(folder).tensors
    assert [file.suffix for file in formats.tokenizer_files(tmp_path)] == [".json", ".bin"]
    _assert_equal(formats.read(tmp_path).tensors, expected)

    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        tensors = {name.replace(f".{new}.", f".{old}."): array for name, array in tensors.items()}
    assert any(".query." in name for name in tensors)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    _assert_equal(formats.read(tmp_path).tensors, expected)


def test_shards_and_variants_are_the_same_model(folder, tmp_path):
    config = (folder / "config.json").read_text()
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    expected = formats.read(folder).tensors
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    names = {
        "shards": {f"-0000{i + 1}-of-00002": half for i, half in enumerate(halves)},
        "variant": {".fp16": {name: array.astype(np.float16) for name, array in tensors.items()}},
        "cut": {"-00001-of-00002": halves[0]},
        "two": {".fp16": tensors, ".bf16": tensors},
    }
    for case, files in names.items():
        (tmp_path / case).mkdir()
        (tmp_path / case / "config.json").write_text(config)
        for name, part in files.items():
            save_file(part, tmp_path / case / f"diffusion_pytorch_model{name}.safetensors")
    _assert_equal(formats.read(tmp_path / "shards").tensors, expected)
    rounded = {name: array.astype(np.float16) for name, array in expected.items()}
    _assert_equal(formats.read(tmp_path / "variant").tensors, rounded)
    with pytest.raises(UserError, match=r"cut/.*-00001-of-00002.safetensors: .*(missing|not the tensors)"):
        weights.load(tmp_path / "cut")
    with pytest.raises(UserError, match=r"bf16.safetensors and .*fp16.safetensors both contain .*: keep the files"):
        formats.read(tmp_path / "two")


def _assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name='AutoencoderKL': another model"),
        ({"norm_type": "spatial"}, "norm_type='spatial': only 'group' is supported"),
        ({"in_channels": 1}, "in_channels=1: only 3 is supported"),
        ({"act_fn": "relu"}, "act_fn='relu': only 'silu' is supported"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "down_block_types: 'DownBlock2D': only DownEncoderBlock2D and"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "attention at the same ones"),
        ({"num_vq_embeddings": 64}, "num_embeddings=64, but the tensors of the weight file have 48"),
        ({"block_out_channels": "16"}, "block_out_channels must be a list"),
    ],
)
def test_models_that_are_near_are_refused(folder, tmp_path, change, message):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=f"^{tmp_path}/config.json: .*{message}"):
        weights.load(tmp_path)


@pytest.mark.slow
def test_pixel_range_of_amused(folder, tmp_path):
    """The tokenizers of aMUSEd are open-muse's, with pixels in [0, 1]; only aMUSEd decodes codes."""
    assert formats.read(folder).settings["pixel_range"] == [-1, 1]
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(
        (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    config = json.loads((folder / "config.json").read_text()) | {"lookup_from_codebook": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert formats.read(tmp_path, 32).settings["pixel_range"] == [0, 1]
    assert formats.read(tmp_path, 32).settings["attn_resolutions"] == [16]
