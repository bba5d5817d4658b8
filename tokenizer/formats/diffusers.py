"""Folders of diffusers' VQModel: config.json and diffusion_pytorch_model.safetensors, its shards, or .bin."""

import pathlib
from typing import Any

from EasyLM.errors import UserError, prefix_errors
from EasyLM.storage import check_schema, read_json
from tokenizer.formats.architecture import (
    DEFAULT_RESOLUTION,
    Translated,
    at_resolution,
    check_equal,
    renamed,
    settings_from_tensors,
)
from tokenizer.formats.tensor_files import read_shards

_STEM = "diffusion_pytorch_model"
_RULES = [
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"^encoder\.down_blocks\.", "encoder.down."),
    (r"^decoder\.up_blocks\.", "decoder.up."),
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    # Attention layers; the second names are those of diffusers before 0.18.
    (r"\.(to_q|query)\.", ".q."),
    (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."),
    (r"\.(to_out\.0|proj_attn)\.", ".proj_out."),
]
_BLOCKS = {"down": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), "up": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")}
_DEFAULTS: dict[str, Any] = {  # of VQModel
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,
    "norm_type": "group",
    "mid_block_add_attention": True,
    "lookup_from_codebook": False,
}
_SCHEMA = {
    "_class_name?": str,
    **{
        f"{name}?": [type(value[0])] if isinstance(value, list) else type(value)
        for name, value in _DEFAULTS.items()
        if value is not None
    },
    "vq_embed_dim?": (int, type(None)),
    "sample_size?": int,
}


def find(path: pathlib.Path) -> list[pathlib.Path] | None:
    """Returns config.json and the weights of a folder; None if it is not one of diffusers.

    Raises:
      UserError: naming the folder, if it has no weights, or holds a whole pipeline.
    """
    if (path / "model_index.json").is_file():
        raise UserError(f"{path}: a pipeline of diffusers: name the subfolder of its VQModel, such as {path}/vqvae")
    config = path / "config.json"
    if not config.is_file():
        return None
    values = read_json(config)
    if "_diffusers_version" not in values and "block_out_channels" not in values:
        return None
    for weights in (path / f"{_STEM}.safetensors", path / f"{_STEM}.bin"):
        if weights.is_file():
            return [config, weights]
    if shards := sorted(path.glob(f"{_STEM}*.safetensors")):  # or a variant: diffusion_pytorch_model.fp16.safetensors
        return [config, *shards]
    raise UserError(f"{path}: no weights: {_STEM}.safetensors or {_STEM}.bin")


def read(files: list[pathlib.Path], resolution: int) -> Translated:
    """Reads the files of `find`.

    Raises:
      UserError: naming the file, if the model is another one or has settings that this network does not support.
    """
    config, *shards = files
    weights = str(shards[0]) if len(shards) == 1 else f"{shards[0].parent}/{_STEM}*.safetensors"
    values = read_json(config)
    with prefix_errors(str(config)):
        _check(values)
        values = _DEFAULTS | values
    tensors = renamed(read_shards(shards), _RULES, r"decoder\.up\.(\d+)\.")
    for name, array in tensors.items():
        if array.ndim == 2 and ".embedding." not in name:  # an attention's linear layer: [out, in]
            tensors[name] = array[:, :, None, None]
    side = values.get("sample_size", DEFAULT_RESOLUTION)
    settings = settings_from_tensors(weights, tensors, side)
    hidden = settings["hidden_channels"]
    attends = [kind == "AttnDownEncoderBlock2D" for kind in values["down_block_types"]]
    stated = {
        "channel_mult": [width / hidden for width in values["block_out_channels"]],
        "num_res_blocks": values["layers_per_block"],
        "z_channels": values["latent_channels"],
        "num_embeddings": values["num_vq_embeddings"],
        "quantized_embed_dim": values["vq_embed_dim"] or values["latent_channels"],
        "no_attn_mid_block": not values["mid_block_add_attention"],
        "attn_resolutions": [side // 2**level for level, has_attention in enumerate(attends) if has_attention],
    }
    check_equal(str(config), stated, settings)
    if resolution:
        settings = at_resolution(settings, resolution)
    ours = {
        "norm_groups": values["norm_num_groups"],
        # Pipelines of VQModel use [-1, 1]. Only aMUSEd decodes codes; its tokenizers are open-muse's, with [0, 1].
        "pixel_range": [0, 1] if values["lookup_from_codebook"] else [-1, 1],
        "skip_single_attention": False,
    }
    return Translated({**settings, **ours}, tensors, weights, str(config))


def _check(values: dict[str, Any]) -> None:
    check_schema(values, _SCHEMA)
    name = values.get("_class_name", "VQModel")
    if name != "VQModel":
        raise UserError(f"_class_name={name!r}: another model; of diffusers, only VQModel is supported")
    values = _DEFAULTS | values
    for setting, only in {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_type": "group"}.items():
        if values[setting] != only:
            raise UserError(f"{setting}={values[setting]!r}: only {only!r} is supported")
    kinds = {way: values[f"{way}_block_types"] for way in _BLOCKS}
    for way, known in _BLOCKS.items():
        if unknown := [kind for kind in kinds[way] if kind not in known]:
            raise UserError(f"{way}_block_types: {unknown[0]!r}: only {' and '.join(known)} are supported")
    down, up = ([kind.startswith("Attn") for kind in kinds[way]] for way in _BLOCKS)
    if down != up[::-1] or len(down) != len(values["block_out_channels"]):
        raise UserError("the decoder must have the levels of the encoder in reverse, with attention at the same ones")
