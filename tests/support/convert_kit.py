"""Export to and import from Hugging Face, and transformers' model, for tests."""

import numpy as np
import pytest

from EasyLM import flags
from EasyLM.models.llama import convert_easylm_to_hf, convert_hf_to_easylm


def run(tool, **values):
    config = flags.defaults(tool.FLAGS)
    config.update(values)
    flags.validate(tool.FLAGS, config)
    tool.main(config)


def export(load_checkpoint, output_dir, **values) -> str:
    run(convert_easylm_to_hf, load_checkpoint=str(load_checkpoint), output_dir=str(output_dir), **values)
    return str(output_dir)


def import_(hf_model, output_file, **values):
    run(convert_hf_to_easylm, hf_model=str(hf_model), output_file=str(output_file), **values)


def tiny_state(golden):
    return f"trainstate_params::{golden}/lvm_tiny/final/streaming_train_state"


def torch_model(directory):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()


def torch_logits(directory, tokens_BT):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return torch_model(directory)(torch.tensor(np.asarray(tokens_BT), dtype=torch.long)).logits.numpy()
