"""Checkpoints of taming-transformers (arXiv 2012.09841) and of latent-diffusion's VQModel: model.yaml and *.ckpt."""

import pathlib
from typing import Any

from EasyLM.errors import UserError, prefix_errors
from EasyLM.storage import check_schema
from tokenizer.formats.architecture import (
    DEFAULT_RESOLUTION,
    GROUPS,
    Translated,
    at_resolution,
    check_equal,
    settings_from_tensors,
)
from tokenizer.formats.tensor_files import read_tensors

_MODELS = (
    "taming.models.vqgan.VQModel",
    "taming.models.vqgan.VQNoDiscModel",
    "ldm.models.autoencoder.VQModel",
    "ldm.models.autoencoder.VQModelInterface",
)
_IGNORED = ("loss.",)  # discriminator and LPIPS
_MOST_YAML_BYTES = 1 << 20
# Settings of `ddconfig` -> settings of this project.
_NAMES = {
    "ch": "hidden_channels",
    "ch_mult": "channel_mult",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
    "z_channels": "z_channels",
    "resamp_with_conv": "resample_with_conv",
}
# Settings of `ddconfig` that must have this value. `dropout` has no effect on encoding and decoding.
_FIXED = {
    "double_z": False,
    "in_channels": 3,
    "out_ch": 3,
    "attn_type": "vanilla",
    "use_linear_attn": False,
    "tanh_out": False,
    "give_pre_end": False,
}
_OTHERS = ("resolution", "dropout")


def find(path: pathlib.Path) -> list[pathlib.Path] | None:
    """Returns the settings and the checkpoint of a folder, or of a *.ckpt file; None if there is no *.ckpt.

    Both lie in the folder itself, or in its subfolders `configs` and `checkpoints`, as taming-transformers writes them.

    Raises:
      UserError: naming the folder, if there are several checkpoints, or no settings.
    """
    if path.suffix == ".ckpt":
        folder, checkpoints = path.parent, [path] if path.is_file() else []
    else:
        folder, checkpoints = path, sorted([*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt")])
    if not checkpoints:
        return None
    if len(checkpoints) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in checkpoints)
        raise UserError(f"{path}: has several checkpoints: name one of {names}")
    folders = [folder, folder / "configs", *([folder.parent / "configs"] if folder.name == "checkpoints" else [])]
    for pattern in ("model.yaml", "*project.yaml", "*.yaml"):
        settings = [file for directory in folders for file in sorted(directory.glob(pattern))]
        if len(settings) == 1:
            return [settings[0], checkpoints[0]]
    raise UserError(f"{path}: a checkpoint of taming-transformers needs its model.yaml beside it, or in configs/")


def read(files: list[pathlib.Path], resolution: int) -> Translated:
    """Reads the files of `find`.

    Raises:
      UserError: naming the file, if the model is another one or has settings that this network does not support.
    """
    config, weights = files
    with prefix_errors(str(config)):
        params = _params(_read_yaml(config))
        ddconfig = params["ddconfig"]
    tensors = read_tensors(weights, _IGNORED)
    trained_resolution = ddconfig.get("resolution", DEFAULT_RESOLUTION)
    settings = settings_from_tensors(str(weights), tensors, trained_resolution)
    stated = {ours: ddconfig[theirs] for theirs, ours in _NAMES.items() if theirs in ddconfig}
    # As in taming-transformers, a side that no level has is without effect.
    sides = [trained_resolution // 2**level for level in range(len(ddconfig["ch_mult"]))]
    stated["attn_resolutions"] = [side for side in sides if side in ddconfig["attn_resolutions"]]
    stated |= {"quantized_embed_dim": params["embed_dim"], "num_embeddings": params["n_embed"]}
    check_equal(str(config), stated, settings)
    if resolution:
        settings = at_resolution(settings, resolution)
    ours = {"norm_groups": GROUPS, "pixel_range": [-1, 1], "skip_single_attention": False}
    return Translated({**settings, **ours}, tensors, str(weights), str(config))


def _read_yaml(path: pathlib.Path) -> Any:
    import yaml

    try:
        text = path.read_text()
        if len(text) > _MOST_YAML_BYTES:
            raise UserError(f"more than {_MOST_YAML_BYTES >> 20} MiB")
        return yaml.safe_load(text)  # makes plain values only
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"not YAML ({str(error).splitlines()[0]})") from None


def _params(content: Any) -> dict[str, Any]:
    """Returns `model.params` of a file of settings, checked."""
    check_schema(content, {"model": {"target": str, "params": dict}})
    target, params = content["model"]["target"], content["model"]["params"]
    if target not in _MODELS:
        raise UserError(f"model.target={target}: another model; supported are {', '.join(_MODELS)}")
    check_schema(params, {"ddconfig": dict, "embed_dim": int, "n_embed": int}, "model.params")
    ddconfig = params["ddconfig"]
    lists = {"ch_mult": [int], "attn_resolutions": [int]}
    numbers = {"z_channels": int, "ch": int, "num_res_blocks": int, "resolution?": int, "resamp_with_conv?": bool}
    check_schema(ddconfig, lists | numbers, "model.params.ddconfig")
    for name, value in ddconfig.items():
        if name not in (*_NAMES, *_FIXED, *_OTHERS):
            raise UserError(f"model.params.ddconfig.{name}={value}: not a setting of this network")
        if name in _FIXED and value != _FIXED[name]:
            raise UserError(f"model.params.ddconfig.{name}={value}: only {_FIXED[name]} is supported")
    if params.get("remap") is not None:
        raise UserError(f"model.params.remap={params['remap']}: a remapped codebook is not supported")
    return params
