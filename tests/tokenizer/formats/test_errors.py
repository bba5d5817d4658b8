"""Files that are near to a supported format, but not the same, are named with the reason."""

import json
import shutil

import numpy as np
import pytest
from hub_cache import cache_repository, offline_cache
from safetensors.numpy import save_file

from EasyLM.errors import UserError
from tokenizer import formats
from tokenizer.vqgan import Codec, weights


@pytest.fixture
def taming(golden, tmp_path):
    """A copy of the small checkpoint of taming-transformers."""
    shutil.copytree(golden / "vq_taming_small", tmp_path, dirs_exist_ok=True)
    return tmp_path


def _change(folder, **changes):
    """Changes settings of model.yaml; `ddconfig` is merged."""
    values = json.loads((folder / "model.yaml").read_text())
    values["model"]["target"] = changes.pop("target", values["model"]["target"])
    values["model"]["params"]["ddconfig"] |= changes.pop("ddconfig", {})
    values["model"]["params"] |= changes
    (folder / "model.yaml").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "taming.models.vqgan.GumbelVQ"}, "model.target=taming.models.vqgan.GumbelVQ: another model"),
        ({"target": "taming.models.lfqgan.VQModel"}, "another model; supported are taming.models.vqgan.VQModel"),
        ({"ddconfig": {"double_z": True}}, "ddconfig.double_z=True: only False is supported"),
        ({"ddconfig": {"out_ch": 1}}, "ddconfig.out_ch=1: only 3 is supported"),
        ({"ddconfig": {"attn_type": "linear"}}, "ddconfig.attn_type=linear: only vanilla is supported"),
        ({"ddconfig": {"colour": 1}}, "ddconfig.colour=1: not a setting of this network"),
        ({"ddconfig": {"ch": "32"}}, "ddconfig.ch must be an integer, not a text"),
        ({"ddconfig": {"num_res_blocks": 2}}, "num_res_blocks=2, but the tensors of the weight file have 1"),
        ({"ddconfig": {"attn_resolutions": [32]}}, r"attn_resolutions=\[32\], but the tensors .* have \[16\]"),
        ({"n_embed": 128}, "num_embeddings=128, but the tensors of the weight file have 256"),
        ({"remap": "used.npy"}, "remap=used.npy: a remapped codebook is not supported"),
        ({"embed_dim": None}, "embed_dim must be an integer, not null"),
    ],
)
def test_settings_of_other_models_are_refused(taming, changes, message):
    _change(taming, **changes)
    with pytest.raises(UserError, match=f"^{taming}/model.yaml: .*{message}"):
        formats.read(taming)


def test_a_model_without_the_settings_of_a_tokenizer_is_named(taming):
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    (taming / "model.yaml").write_text(json.dumps({"model": {"target": target, "params": {"timesteps": 1000}}}))
    with pytest.raises(UserError, match=rf"^{taming}/model.yaml: model.target={target}: another model; supported are"):
        formats.read(taming)
    without = {"model": {"target": "taming.models.vqgan.VQModel", "params": {"embed_dim": 4, "n_embed": 8}}}
    (taming / "model.yaml").write_text(json.dumps(without))
    with pytest.raises(UserError, match=r"model\.yaml: model\.params lacks the key 'ddconfig'"):
        formats.read(taming)


def test_yaml_that_makes_objects_is_refused(taming):
    (taming / "model.yaml").write_text("model: !!python/object/apply:os.mkdir [hacked]")
    with pytest.raises(UserError, match=r"model\.yaml: not YAML"):
        formats.read(taming)
    (taming / "model.yaml").write_text("- a list")
    with pytest.raises(UserError, match=r"model\.yaml: must be an object, not a list"):
        formats.read(taming)


def test_settings_are_found_where_taming_writes_them(taming):
    for folder, file in (("configs", "model.yaml"), ("checkpoints", "last.ckpt")):
        (taming / folder).mkdir()
        (taming / file).rename(taming / folder / file)
    (taming / "configs" / "model.yaml").rename(taming / "configs" / "2021-01-01-project.yaml")
    (taming / "configs" / "2021-01-01-lightning.yaml").write_text("trainer: {}")
    files = [taming / "configs" / "2021-01-01-project.yaml", taming / "checkpoints" / "last.ckpt"]
    assert formats.tokenizer_files(taming) == files
    assert formats.tokenizer_files(files[1]) == files
    shutil.copy(files[1], taming / "checkpoints" / "epoch=1.ckpt")
    with pytest.raises(UserError, match=r"several checkpoints: name one of checkpoints/epoch=1\.ckpt, check"):
        formats.tokenizer_files(taming)
    shutil.rmtree(taming / "configs")
    with pytest.raises(UserError, match=r"needs its model\.yaml"):
        formats.tokenizer_files(files[1])


def test_lightning_objects_and_losses_are_passed_over(taming, golden):
    torch = pytest.importorskip("torch")
    content = torch.load(golden / "vq_taming_small" / "last.ckpt", weights_only=True)
    content["state_dict"]["loss.discriminator.main.0.weight"] = torch.zeros(2)
    content |= {"callbacks": {Callback: Callback()}, "epoch": 3}
    torch.save(content, taming / "last.ckpt")
    tensors = formats.read(taming).tensors
    expected = formats.read(golden / "vq_taming_small").tensors
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(array, expected[name]) for name, array in tensors.items())


class Callback:
    """Stands for a callback of Lightning."""


def test_files_without_a_tokenizer_are_named(tmp_path, golden):
    with pytest.raises(UserError, match=f"^--vqgan={tmp_path}/none: .*no such file or folder"):
        Codec(str(tmp_path / "none"))
    path = tmp_path / "c2i_B_256.safetensors"
    save_file({"layers.0.attention.wqkv.weight": np.zeros((4, 4), np.float32)}, path)
    with pytest.raises(UserError, match=r"c2i_B_256.safetensors: not a tokenizer of LlamaGen, which has tensors enc"):
        formats.read(path)
    for name in ("vq_ds8.pt", "vq_ds16.pt"):
        shutil.copy(golden / "vq_llamagen_small" / "vq.pt", tmp_path / name)
    with pytest.raises(UserError, match=r"several \*.pt files: name one of vq_ds16.pt, vq_ds8.pt"):
        formats.read(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="a pipeline of diffusers: name the subfolder"):
        formats.read(tmp_path)


def test_names_on_the_hub_are_read_from_its_cache(tmp_path, monkeypatch, golden):
    cache = offline_cache(tmp_path, monkeypatch)
    llamagen = cache_repository(cache, "Owner/llamagen", golden / "vq_llamagen_small")
    taming = cache_repository(cache, "Owner/taming", {"vq/model.yaml": b"{}", "vq/last.ckpt": b""}, "v2")
    assert formats.tokenizer_files("Owner/llamagen") == [llamagen / "vq.pt"]
    assert formats.tokenizer_files("Owner/llamagen/vq.pt") == [llamagen / "vq.pt"]
    assert formats.tokenizer_files("Owner/taming@v2/vq") == [taming / "vq" / "model.yaml", taming / "vq" / "last.ckpt"]
    with pytest.raises(
        UserError, match=r"^--vqgan=gs://lab/vq: gs://lab/vq: a tokenizer is read from a local disk, or"
    ):
        Codec("gs://lab/vq")


@pytest.mark.slow
def test_tensors_of_a_near_network_are_named(tmp_path, golden):
    tensors = formats.read_tensors(golden / "vq_llamagen_small" / "vq.pt")

    def refused(message, **changes):
        changed = {name: array for name, array in {**tensors, **changes}.items() if array is not None}
        save_file(changed, tmp_path / "vq.safetensors")
        with pytest.raises(UserError, match=message):
            weights.load(tmp_path / "vq.safetensors", resolution=64)

    refused("quantize.embedding.weight with 2 dimensions is missing", **{"quantize.embedding.weight": None})
    refused("unexpected keys: quantize.proj.weight", **{"quantize.proj.weight": np.zeros((2, 2), np.float32)})
    refused("missing keys: decoder.mid.attn_1.q.bias", **{"decoder.mid.1.q.bias": None})
    refused(
        r"the levels have \[33, 64, 64\] channels; only multiples of the 32",
        **{"encoder.conv_blocks.0.res.0.conv1.weight": np.zeros((33, 32, 3, 3), np.float32)},
    )
    with pytest.raises(UserError, match="resolution=66: must be divisible by 4"):
        weights.load(golden / "vq_llamagen_small", resolution=66)
