"""Files of LlamaGen (arXiv 2406.06525): vq_ds16_c2i.pt, vq_ds8_c2i.pt, vq_ds16_t2i.pt, or a training checkpoint.

A file holds no settings. Widths follow from the tensors. The rest is the same in all of LlamaGen's tokenizers: pixels
in [-1, 1], and vectors and codes of length 1.
"""

import pathlib

from EasyLM.errors import UserError
from tokenizer.formats.architecture import DEFAULT_RESOLUTION, GROUPS, Translated, renamed, settings_from_tensors
from tokenizer.formats.tensor_files import read_tensors

_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_RULES = [
    (r"^(encoder|decoder)\.mid\.0\.", r"\1.mid.block_1."),
    (r"^(encoder|decoder)\.mid\.1\.", r"\1.mid.attn_1."),
    (r"^(encoder|decoder)\.mid\.2\.", r"\1.mid.block_2."),
    (r"^encoder\.conv_blocks\.", "encoder.down."),
    (r"^decoder\.conv_blocks\.", "decoder.up."),
    (r"\.res\.(\d+)\.", r".block.\1."),
]
_IGNORED = ("quantize.codebook_used",)  # counts the uses of codes in training


def find(path: pathlib.Path) -> list[pathlib.Path] | None:
    """Returns a weight file, or the only *.pt file of a folder; None if there is none."""
    if path.is_file():
        return [path] if path.suffix in _SUFFIXES else None
    files = sorted(path.glob("*.pt"))
    if len(files) > 1:
        raise UserError(f"{path}: has several *.pt files: name one of {', '.join(file.name for file in files)}")
    return files or None


def read(files: list[pathlib.Path], resolution: int) -> Translated:
    """Reads the file of `find`.

    Raises:
      UserError: naming the file, if it is not a tokenizer of LlamaGen.
    """
    source = str(files[0])
    tensors = read_tensors(files[0], _IGNORED)
    if not any(name.startswith("encoder.conv_blocks.") for name in tensors):
        raise UserError(
            f"{source}: not a tokenizer of LlamaGen, which has tensors encoder.conv_blocks.*; for that of another "
            "project, name the folder with its settings: config.json, or model.yaml and *.ckpt"
        )
    tensors = renamed(tensors, _RULES, r"decoder\.up\.(\d+)\.")
    settings = settings_from_tensors(source, tensors, resolution or DEFAULT_RESOLUTION)
    return Translated(
        {
            **settings,
            "norm_groups": GROUPS,
            "pixel_range": [-1, 1],
            "normalize_codes": True,
            "skip_single_attention": False,
        },
        tensors,
        source,
        source,
    )
