"""From the flags of a dataset to its row source. Nothing here imports JAX."""

import functools
from fractions import Fraction

import numpy as np

from EasyLM.data import packed_file
from EasyLM.data.mixture import MixedRows, block_counts
from EasyLM.data.proportions import parse_numbers
from EasyLM.data.record_fields import TEXT_PROCESSOR_FLAGS, make_processor
from EasyLM.data.text_examples import FileExamples, huggingface_examples
from EasyLM.data.token_rows import TokenRows
from EasyLM.data.token_store import STORE_DTYPES, TokenStore
from EasyLM.data.token_stream import JsonLines
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.storage import expand_path_groups, is_compressed

TYPES = ("json", "huggingface")

DATASET_FLAGS = {
    "type": Flag("json", "Where examples come from: JSON lines, or a Hugging Face dataset.", choices=TYPES),
    "text_processor": TEXT_PROCESSOR_FLAGS,
    "json_dataset": {
        "path": Flag(
            "", "JSONL files, local or remote (gs://, s3://, ...), or packed ones: a comma list of paths and globs."
        ),
        "weights": Flag(
            "",
            "Comma list, one a part of `path`: its share of the rows; each part is gone through again and again at "
            "its own pace. Empty: all files one after another, each row once an epoch.",
        ),
        "seq_length": Flag(1024, "Tokens of a row.", least=1),
        "batch_size": Flag(8, "Rows of the global batch of one micro-step.", least=1),
        "always_start_with_bos": Flag(False, "Replace the first input token of each row by the bos id."),
        "start_seek_loc": Flag(0, "Byte offset in the first file, where a line begins, at which the data begins."),
        "example_index_at_start": Flag(0, "Where the counter dataset_example_index begins."),
        "tokens_count_at_start": Flag(0, "Where the counter dataset_total_tokens begins."),
        "tokenizer_processes": Flag(
            1, "Processes that index files, or tokenize text (of huggingface_dataset too).", least=1
        ),
        "tokenizer_parallel_chunk_size": Flag(32, "Texts that a tokenizing process is given at a time.", least=1),
        "tokenizer_parallel_batch_size": Flag(1024, "Texts read ahead for the tokenizing processes.", least=1),
        "throughput_average_window_size": Flag(200, "Batches over which dataset_average_tps is averaged.", least=1),
        "shuffle_seed": Flag(-1, "Seed of a new order of all rows in each epoch; negative: the order of the files."),
        "skip_bad_lines": Flag(False, "Leave out lines that are no record (dataset_skipped_lines counts them)."),
    },
    "huggingface_dataset": {
        "path": Flag(
            "c4", "A dataset of the hub, a `save_to_disk` directory, or .jsonl or .txt files or their directory."
        ),
        "name": Flag("en", "Configuration of a dataset of the hub."),
        "split": Flag("train", "Split of the dataset."),
        "streaming": Flag(False, "Tokenize while downloading, without keeping the dataset itself on disk."),
        "seq_length": Flag(1024, "Tokens of a row.", least=1),
        "batch_size": Flag(8, "Rows of the global batch of one micro-step.", least=1),
        "always_start_with_bos": Flag(False, "Replace the first input token of each row by the bos id."),
        "batch_token_dtype": Flag("i4", "Item type of the token ids of a batch.", choices=STORE_DTYPES),
    },
}


def settings(config):
    """The part of a dataset config that its `type` selects."""
    return config[f"{config.type}_dataset"]


def make_dataset(config, tokenizer, vocab_size: int, name: str = "train_dataset"):
    """The row source of a `DATASET_FLAGS` config: `TokenRows`, or of weighted parts `MixedRows`.

    Checks all settings, then indexes or tokenizes what is not yet.

    Args:
      tokenizer: a text tokenizer, or None.
      vocab_size: of the model; ids must be below it.
      name: how messages call the config's flags.

    Raises:
      UserError: naming the flag, or the line `file:line`, and what is wrong with it.
    """
    chosen, group = settings(config), f"{name}.{config.type}_dataset"
    processor = make_processor(config.text_processor, vocab_size, tokenizer, f"{name}.text_processor")
    if processor.needs_text and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"--tokenizer.vocab_file has {tokenizer.vocab_size} ids, more than the model's vocabulary of {vocab_size}"
        )
    if chosen.always_start_with_bos and not 0 <= processor.bos < vocab_size:
        raise UserError(f"--{group}.always_start_with_bos: bos id {processor.bos} is not in 0..{vocab_size - 1}")
    make = _json_rows if config.type == "json" else _huggingface_rows
    first_id = processor.bos if chosen.always_start_with_bos else None
    return make(chosen, config.json_dataset, processor, group, first_id)


def _json_rows(config, _, processor, group, first_id):
    parts = expand_path_groups(f"{group}.path", config.path)
    make = functools.partial(_file_rows, config, processor, group, first_id)
    if not config.weights:
        return make([path for _, paths in parts for path in paths], config.shuffle_seed)
    weights = parse_numbers(f"{group}.weights", config.weights, len(parts), Fraction)
    counts = block_counts(f"{group}.weights", weights)
    for name in ("start_seek_loc", "example_index_at_start"):
        if config[name]:
            raise UserError(f"--{group}.{name}={config[name]}: has no meaning with --{group}.weights={config.weights}")
    # Each part in an order of its own: parts of one size would else run through theirs in step.
    seeds = [config.shuffle_seed + (i << 32) if config.shuffle_seed >= 0 else -1 for i in range(len(parts))]
    return MixedRows(
        [make(paths, seed) for (_, paths), seed in zip(parts, seeds)],
        counts,
        shuffle_seed=config.shuffle_seed,
        token_count=config.tokens_count_at_start,
        window=config.throughput_average_window_size,
    )


def _file_rows(config, processor, group, first_id, paths, shuffle_seed):
    for path in paths:
        if is_compressed(path):
            raise UserError(
                f"--{group}.path: {path} is compressed, and rows are read at any place of a file: unpack it, or make "
                "one of all with tokenizer.mix or tokenizer.pack, which read it as it is"
            )
        if processor.needs_text and packed_file.is_packed(path):
            raise UserError(f"--{group}.path: {path} is packed and holds no text")
    if processor.needs_text:
        stream = _token_store(FileExamples(paths), processor, "i4", config, config.skip_bad_lines)
    else:
        stream = JsonLines(paths, processor, config.tokenizer_processes, config.skip_bad_lines)
    try:
        first_token = stream.token_at(config.start_seek_loc)
    except UserError as error:
        raise UserError(f"--{group}.start_seek_loc={config.start_seek_loc}: {error}") from None
    return TokenRows(
        stream,
        config.seq_length,
        config.batch_size,
        shuffle_seed=shuffle_seed,
        first_id=first_id,
        first_token=first_token,
        first_example=config.example_index_at_start,
        token_count=config.tokens_count_at_start,
        window=config.throughput_average_window_size,
    )


def _huggingface_rows(config, processing, processor, group, first_id):
    largest = np.iinfo(config.batch_token_dtype).max
    if processor.vocab_size - 1 > largest:
        raise UserError(
            f"--{group}.batch_token_dtype={config.batch_token_dtype}: holds ids up to {largest}, the vocabulary has "
            f"{processor.vocab_size}"
        )
    examples = huggingface_examples(config, group)
    stream = _token_store(examples, processor, config.batch_token_dtype, processing, skip_bad_lines=False)
    return TokenRows(
        stream,
        config.seq_length,
        config.batch_size,
        first_id=first_id,
        dtype=config.batch_token_dtype,
        window=processing.throughput_average_window_size,
    )


def _token_store(examples, processor, dtype, processing, skip_bad_lines):
    return TokenStore(
        examples,
        processor,
        dtype,
        processing.tokenizer_processes,
        processing.tokenizer_parallel_chunk_size,
        processing.tokenizer_parallel_batch_size,
        skip_bad_lines,
    )
