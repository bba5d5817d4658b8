"""Row sources from the flags of a dataset."""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from ml_collections import ConfigDict

from EasyLM.data.mixture import MixedRows, block_counts, parse_numbers
from EasyLM.data.packed_file import is_packed
from EasyLM.data.protocols import Examples, Tokenizer, TokenStream
from EasyLM.data.record_fields import TEXT_PROCESSOR_FLAGS, FieldSettings, RecordProcessor, make_processor
from EasyLM.data.text_examples import FileExamples, huggingface_examples
from EasyLM.data.token_rows import RowSettings, TokenRows, no_rows
from EasyLM.data.token_store import STORE_DTYPES, TokenizationSettings, TokenStore
from EasyLM.data.token_stream import FileTokenStream
from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag, to_dataclass
from EasyLM.storage import expand_path_groups, is_compressed
from EasyLM.vocab import BOS, EOS

TYPES = ("json", "huggingface")

DATASET_FLAGS = {
    "type": Flag("json", "Where examples come from: JSON lines, or a Hugging Face dataset.", choices=TYPES),
    "text_processor": TEXT_PROCESSOR_FLAGS,
    "json_dataset": {
        "path": Flag(
            "", "JSONL or packed files, local or remote (gs://, s3://, ...): a comma list of paths and globs."
        ),
        "weights": Flag(
            "",
            "Comma list of shares of the rows, one for each element of `path`; each element has its own epochs. Empty: "
            "the files are read one after another, each row once per epoch.",
        ),
        "seq_length": Flag(1024, "Tokens in a row.", least=1),
        "batch_size": Flag(8, "Rows in the global batch of one micro-step.", least=1),
        "always_start_with_bos": Flag(False, "Replace the first input token of each row by the bos id."),
        "document_mask": Flag(
            False,
            "A token attends to its own sentence only, and positions restart at each sentence; the first token of a "
            "sentence is no target. On GPUs attention takes longer with the mask (docs/train.md, Documents on GPUs).",
        ),
        "start_seek_loc": Flag(0, "Byte offset in the first file at which the data starts; a line must start there."),
        "example_index_at_start": Flag(0, "Start of the counter dataset_example_index."),
        "tokens_count_at_start": Flag(0, "Start of the counter dataset_total_tokens."),
        "tokenizer_processes": Flag(
            1, "Processes that index files or tokenize text; huggingface_dataset uses it too.", least=1
        ),
        "tokenizer_parallel_chunk_size": Flag(32, "Texts in one task of a tokenizing process.", least=1),
        "tokenizer_parallel_batch_size": Flag(1024, "Texts read ahead for the tokenizing processes.", least=1),
        "throughput_average_window_size": Flag(200, "Batches over which dataset_average_tps is averaged.", least=1),
        "shuffle_seed": Flag(
            -1, "Seed of the order of the rows, new in each epoch; negative: the order of the files.", most=2**62
        ),
        "skip_bad_lines": Flag(False, "Skip lines that are not records (counted by dataset_skipped_lines)."),
    },
    "huggingface_dataset": {
        "path": Flag(
            "c4", "A dataset of the Hub, a `save_to_disk` directory, or .jsonl or .txt files or their directory."
        ),
        "name": Flag("en", "Configuration of a dataset of the Hub."),
        "split": Flag("train", "Split of the dataset."),
        "streaming": Flag(False, "Tokenize while downloading, without keeping the dataset itself on disk."),
        "seq_length": Flag(1024, "Tokens in a row.", least=1),
        "batch_size": Flag(8, "Rows in the global batch of one micro-step.", least=1),
        "always_start_with_bos": Flag(False, "Replace the first input token of each row by the bos id."),
        "batch_token_dtype": Flag("i4", "Item type of the token ids of a batch.", choices=STORE_DTYPES),
    },
}


def settings(config: ConfigDict) -> ConfigDict:
    """Returns the part of a dataset config that its `type` selects."""
    return config[f"{config.type}_dataset"]


def no_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """Returns a batch of no rows of a `DATASET_FLAGS` config: names, shapes [0, T] and types. Reads no files."""
    selected = settings(config)
    dtype = selected.get("batch_token_dtype", RowSettings.dtype)
    return no_rows(selected.seq_length, dtype, selected.get("document_mask", False))


def make_dataset(
    config: ConfigDict,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    name: str = "train_dataset",
    bos: int = BOS,
    eos: int = EOS,
) -> TokenRows | MixedRows:
    """Returns the row source of a `DATASET_FLAGS` config.

    Checks all settings, then indexes or tokenizes the data that is not cached.

    Args:
      vocab_size: of the model; ids must be below it.
      name: prefix of the flags in messages.
      bos, eos: special ids of the model, unless there is a text tokenizer.

    Raises:
      UserError: naming the flag, or FILE:LINE of a line that is not a record.
    """
    selected, group = settings(config), f"{name}.{config.type}_dataset"
    with prefix_errors(f"--{name}.text_processor", "."):
        processor = make_processor(to_dataclass(FieldSettings, config.text_processor), vocab_size, tokenizer, bos, eos)
    if tokenizer is not None and processor.needs_text and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"--tokenizer.vocab_file has {tokenizer.vocab_size} ids, more than the model's vocabulary of {vocab_size}"
        )
    if selected.always_start_with_bos and not 0 <= processor.bos < vocab_size:
        raise UserError(f"--{group}.always_start_with_bos: bos id {processor.bos} is not in 0..{vocab_size - 1}")
    rows = RowSettings(
        seq_length=selected.seq_length,
        batch_size=selected.batch_size,
        first_id=processor.bos if selected.always_start_with_bos else None,
        window=config.json_dataset.throughput_average_window_size,
    )
    tokenization = TokenizationSettings(
        config.json_dataset.tokenizer_processes,
        config.json_dataset.tokenizer_parallel_chunk_size,
        config.json_dataset.tokenizer_parallel_batch_size,
    )
    if config.type == "json":
        return _json_rows(selected, group, _FileReader(processor, tokenization, selected.skip_bad_lines), rows)
    with prefix_errors(f"--{group}", "."):
        _check_store_dtype(selected.batch_token_dtype, vocab_size)
        examples = huggingface_examples(selected.path, selected.name, selected.split, selected.streaming)
    stream = TokenStore(examples, processor, tokenization, selected.batch_token_dtype)
    return TokenRows(stream, dataclasses.replace(rows, dtype=selected.batch_token_dtype))


@dataclasses.dataclass(frozen=True)
class _FileReader:
    """Opens files as a token stream."""

    processor: RecordProcessor
    tokenization: TokenizationSettings
    skip_bad_lines: bool

    def check(self, paths: Sequence[str]) -> None:
        """Raises UserError, naming the first file that `open` cannot read because of its type."""
        for path in paths:
            if is_compressed(path):
                raise UserError(
                    f"{path} is compressed, but training reads from any offset of a file: decompress it, or combine "
                    "files with tokenizer.mix or tokenizer.pack, which read compressed files"
                )
            if self.processor.needs_text and is_packed(path):
                raise UserError(f"{path} is packed and holds no text")

    def open(self, paths: list[str]) -> TokenStream:
        """Returns the token stream of the files. Indexes or tokenizes those that are not cached."""
        if self.processor.needs_text:
            examples: Examples = FileExamples(paths)
            return TokenStore(examples, self.processor, self.tokenization, skip_bad_lines=self.skip_bad_lines)
        return FileTokenStream(paths, self.processor, self.tokenization.processes, self.skip_bad_lines)


def _json_rows(config: ConfigDict, group: str, reader: _FileReader, rows: RowSettings) -> TokenRows | MixedRows:
    """Returns the rows of a `json_dataset` config. `group` is the prefix of its flags."""
    rows = dataclasses.replace(
        rows,
        shuffle_seed=config.shuffle_seed,
        document_mask=config.document_mask,
        first_example=config.example_index_at_start,
        token_count=config.tokens_count_at_start,
    )
    path_groups = [paths for _, paths in expand_path_groups(f"{group}.path", config.path)]
    all_paths = [path for paths in path_groups for path in paths]
    with prefix_errors(f"--{group}.path"):
        reader.check(all_paths)
    if config.weights:
        for name in ("start_seek_loc", "example_index_at_start"):
            if config[name]:
                raise UserError(f"--{group}.{name}={config[name]}: has no effect with --{group}.weights")
        with prefix_errors(f"--{group}.weights={config.weights}"):
            counts = block_counts(parse_numbers(config.weights, len(path_groups), Fraction))
        return _mixed_rows([reader.open(paths) for paths in path_groups], counts, rows)
    stream = reader.open(all_paths)
    with prefix_errors(f"--{group}.start_seek_loc={config.start_seek_loc}"):
        first_token = stream.token_at(config.start_seek_loc)
    return TokenRows(stream, rows, first_token)


def _mixed_rows(streams: Sequence[TokenStream], counts: list[int], rows: RowSettings) -> MixedRows:
    """Mixes the rows of streams. Each stream has its own shuffle seed: equal orders would correlate the sources."""
    seed = rows.shuffle_seed
    seeds = [seed + (number << 32) if seed >= 0 else -1 for number in range(len(streams))]
    return MixedRows(
        [TokenRows(stream, dataclasses.replace(rows, shuffle_seed=seed)) for stream, seed in zip(streams, seeds)],
        counts,
        shuffle_seed=rows.shuffle_seed,
        token_count=rows.token_count,
        window=rows.window,
    )


def _check_store_dtype(dtype: str, vocab_size: int) -> None:
    largest = np.iinfo(dtype).max
    if vocab_size - 1 > largest:
        raise UserError(f"batch_token_dtype={dtype}: holds ids up to {largest}, the vocabulary has {vocab_size}")
