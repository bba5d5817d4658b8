"""Datasets for tests, and reference implementations of reading them with json and base64."""

import base64
import json
import pathlib
import shutil

import numpy as np

from EasyLM import flags
from EasyLM.data import make_dataset
from EasyLM.data.dataset import DATASET_FLAGS


def copy_golden(golden: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    """Copies the golden dataset to a directory where an index may be written."""
    return shutil.copy(golden / "lvm_tiny" / "dataset.jsonl", directory / "dataset.jsonl")


def dataset(path, seq_length=128, vocab_size=512, fields=",{tokens},", token_dtype="i4", **settings):
    """Returns the row source of JSONL files; `settings` are flags of json_dataset."""
    config = flags.defaults(DATASET_FLAGS)
    config.text_processor.update(fields=fields, base64_token_dtype=token_dtype)
    config.json_dataset.update(path=str(path), seq_length=seq_length, batch_size=4, **settings)
    flags.validate(DATASET_FLAGS, config)
    return make_dataset(config, None, vocab_size)


def plain_stream(*paths):
    """Returns all tokens of JSONL files."""
    tokens = []
    for path in paths:
        with open(path) as lines:
            for line in lines:
                tokens += np.frombuffer(base64.b64decode(json.loads(line)["tokens"]), "<i4").tolist()
    return np.array(tokens)


def plain_rows(stream, seq_length, start, count, begin=0):
    """Returns inputs and targets as the LVM release packs them: consecutive tokens, and those one position later."""
    index = begin + np.arange(start * seq_length, (start + count) * seq_length + 1)
    tokens = stream[index % len(stream)]
    return tokens[:-1].reshape(count, seq_length), tokens[1:].reshape(count, seq_length)


def assert_rows(got, inputs, targets, masks=None):
    np.testing.assert_array_equal(got["input_tokens"], inputs)
    np.testing.assert_array_equal(got["target_tokens"], targets)
    np.testing.assert_array_equal(got["loss_masks"], np.ones_like(inputs) if masks is None else masks)
    assert [array.dtype for array in got.values()] == [np.int32, np.int32, np.float32]


def base64_line(ids, template='{"tokens": "%s"}', dtype="<i4"):
    return template % base64.b64encode(np.asarray(ids).astype(dtype).tobytes()).decode()
