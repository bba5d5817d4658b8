"""Text data for tests: sentences, dataset flags, and a reference implementation of rows."""

import json

import numpy as np

from EasyLM import flags
from EasyLM.data import DATASET_FLAGS

SEQ_LENGTH = 16
SENTENCES = [
    "a dog runs over the green field",
    "the cat sleeps on the red chair",
    "two birds fly over a blue house",
    "a green bird and a red dog sleep",
] * 5


def text_config(kind, path, fields="text", **settings):
    config = flags.defaults(DATASET_FLAGS)
    config.type = kind
    config.text_processor.fields = fields
    config[f"{kind}_dataset"].update(path=str(path), seq_length=SEQ_LENGTH, batch_size=2, **settings)
    return config


def write_jsonl(path, sentences=SENTENCES, **others):
    path.write_text("".join(json.dumps({"text": sentence, **others}) + "\n" for sentence in sentences))
    return path


def text_rows(ids, count):
    stream = np.resize(np.array(ids), count * SEQ_LENGTH + 1)
    return stream[:-1].reshape(count, SEQ_LENGTH), stream[1:].reshape(count, SEQ_LENGTH)


def encoded(tokenizer, sentences=SENTENCES):
    return [token for sentence in sentences for token in tokenizer.encode(sentence)]
