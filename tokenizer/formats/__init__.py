"""Tokenizers of any origin: the interface that they share, and the file formats of several projects.

May import: EasyLM.storage, and inside functions EasyLM.checkpoints: importing this room imports no JAX.

    protocol      ImageTokenizer: what the other rooms need of a tokenizer
    detection     finds the files of a tokenizer, and reads them
    open_muse     folders of open-muse, of the LVM release, and of this project
    llamagen      files of LlamaGen
    taming        checkpoints of taming-transformers, and of latent-diffusion
    diffusers     folders of diffusers' VQModel
    architecture  settings of a network from the shapes of its tensors
    tensor_files  tensors of safetensors files and of torch files

Vocabulary: a format is how one project names the tensors and settings of its tokenizers. All of these projects use the
same network. `read` translates each format to that of this project: the keys of config.json (`VQGANConfig`) and the
tensor names of open-muse, such as `encoder.down.0.block.1.norm1.weight`.
"""

from tokenizer.formats.detection import read, tokenizer_files
from tokenizer.formats.protocol import ImageTokenizer
from tokenizer.formats.tensor_files import check_tensors, read_tensors

__all__ = ["ImageTokenizer", "check_tensors", "read", "read_tensors", "tokenizer_files"]
