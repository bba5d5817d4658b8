"""Writes sentences of `tokenizer.mappings` with a field list of their own, so that only answers are in the loss.

    PYTHONPATH=. python scripts/in_context/answers.py --input_file=sentences.jsonl --output_file=answers.jsonl

Train with --train_dataset.text_processor.fields_from_example=fields. All frames of a clip stay in the loss.
"""

import orjson
import pybase64
from ml_collections import ConfigDict

from EasyLM.data.records import TOKENS_KEY
from EasyLM.flags import Flag, run
from EasyLM.storage import atomic_file, check_output
from tokenizer.mappings.sentences import FRAMES, NUM_IMAGES

FLAGS = {
    "input_file": Flag("", "JSONL file of `tokenizer.mappings`.", required=True),
    "output_file": Flag("", "JSONL file to write.", required=True),
}
FIELDS = ",".join(f"{{{number}}}" if number % 2 else f"[{{{number}}}]" for number in range(NUM_IMAGES))


def main(config: ConfigDict) -> None:
    """Converts the file line by line."""
    check_output(config.output_file, "output_file")
    with open(config.input_file, "rb") as lines, atomic_file(config.output_file) as file:
        for line in lines:
            record = orjson.loads(line)
            record = record | {"fields": f"{{{TOKENS_KEY}}}"} if record["kind"] == FRAMES else divided(record)
            file.write(orjson.dumps(record) + b"\n")


def divided(record: dict) -> dict:
    """Returns the record with its images as fields 0, 1, ..., of which its field list excludes the inputs."""
    ids, kept = pybase64.b64decode(record[TOKENS_KEY]), {k: v for k, v in record.items() if k != TOKENS_KEY}
    size = len(ids) // NUM_IMAGES
    images = {str(i): pybase64.b64encode_as_string(ids[i * size : (i + 1) * size]) for i in range(NUM_IMAGES)}
    return kept | images | {"fields": FIELDS}


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
