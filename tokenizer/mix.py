"""Mixes and shuffles JSONL files into one: `python -m tokenizer.mix --inputs=a.jsonl,'b/*.jsonl.gz' --output_file=F`.

An input is a path or a glob; the files of a glob are one source. .gz and .zst files are decompressed. Lines are copied
unchanged, except for carriage returns at their ends; with --answers_only, they are written anew with a field list for
the trainer. Before anything is written, all lines and the free disk space are checked. The order is a uniform
permutation of all sentences. It depends on the inputs, the seed and the numbers of sentences to take, not on
--memory_mb.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from EasyLM.data import packed_file, parse_numbers, proportional
from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag, run
from EasyLM.skipped_inputs import SkippedInputs
from EasyLM.storage import check_output, check_plain_file, expand_path_groups, lock_output, write_json
from EasyLM.vocab import NUM_SPECIAL_IDS, VOCAB_SIZE
from tokenizer.sentence_files.answers import answers_line
from tokenizer.sentence_files.disk_space import check_disk_space
from tokenizer.sentence_files.mixing import Source, count_lines, needed_space, write_mixture
from tokenizer.sentence_files.parts import check_parts

FLAGS = {
    "inputs": Flag(
        "", "JSONL files, also .gz and .zst: a comma list of paths and globs; a glob is one input.", required=True
    ),
    "output_file": Flag("", "The JSONL file, written atomically.", required=True),
    "weights": Flag("", "Comma list, one number per input: its share of the mixture. Empty: each sentence once."),
    "total": Flag(0, "With --weights: sentences in the mixture; 0: as many as possible without repetition.", least=0),
    "counts": Flag("", "Comma list, one number per input: sentences to take; they repeat if the input has fewer."),
    "seed": Flag(0, "Seed of the order and of the choice of sentences.", least=0),
    "vocab_size": Flag(VOCAB_SIZE, f"Ids must be below it: codes, and {NUM_SPECIAL_IDS} special ids.", least=1),
    "answers_only": Flag(
        False,
        "Exclude the images of pairs (image, annotation) from the loss. Train on the result with "
        "--train_dataset.text_processor.fields_from_example=fields.",
    ),
    "max_errors": Flag(0, "Maximum number of bad lines to skip; each is reported.", least=0),
    "memory_mb": Flag(
        512, "Megabytes of lines in memory; the other lines are in temporary files beside the output.", least=1
    ),
    "output_json": Flag("", "Write a report of the inputs to this file."),
}


def main(config: ConfigDict) -> None:
    """Mixes the inputs and prints how many sentences of each were taken."""
    sources = _sources(config)
    with lock_output(config.output_file, "output_file"):
        _mix(sources, config)


def _mix(sources: Sequence[Source], config: ConfigDict) -> None:
    convert = answers_line if config.answers_only else bytes
    tokenizer = count_lines(sources, config.vocab_size, SkippedInputs(config.max_errors), convert)
    if tokenizer.name and tokenizer.unnamed:
        print(f"warning: {tokenizer.unnamed} sentences do not name their tokenizer; the others name {tokenizer.name}")
    for source, taken in zip(sources, _taken(sources, config)):
        source.taken = taken
        if taken and not source.sentences:
            raise UserError(f"--inputs={config.inputs}: {source.name} contains no sentence")
    if not any(source.taken for source in sources):
        raise UserError(f"--inputs={config.inputs}: no sentence is taken")
    memory_bytes = config.memory_mb * 10**6
    with prefix_errors("--output_file", separator="="):
        check_disk_space(config.output_file, needed_space(sources, memory_bytes))
    total = write_mixture(config.output_file, sources, config.seed, memory_bytes, convert)
    statistics = [source.statistics() for source in sources]
    for values in statistics:
        print("{input}: {taken} of {sentences} sentences ({times:.2f} times), {bad_lines} bad lines".format(**values))
    print(f"{config.output_file}: {total} sentences")
    if config.output_json:
        write_json(config.output_json, {"sentences": total, "seed": config.seed, "inputs": statistics})


def _sources(config: ConfigDict) -> list[Source]:
    """Returns the inputs. Validates the flags that can be validated without reading the inputs."""
    if config.weights and config.counts:
        raise UserError(f"--weights={config.weights} and --counts={config.counts}: give one of them")
    if config.total and not config.weights:
        raise UserError(f"--total={config.total}: requires --weights")
    check_plain_file(config.output_file, "output_file")
    sources = [Source(name, paths) for name, paths in expand_path_groups("inputs", config.inputs)]
    paths = [path for source in sources for path in source.paths]
    for path in paths:
        if packed_file.is_packed(path):
            raise UserError(f"--inputs={config.inputs}: {path} is packed: unpack it first (tokenizer.pack --unpack)")
    check_output(config.output_file, "output_file", paths)
    with prefix_errors(f"--inputs={config.inputs}"):
        check_parts(paths)
    if config.output_json:
        check_output(config.output_json, "output_json", [*paths, config.output_file])
    return sources


def _taken(sources: Sequence[Source], config: ConfigDict) -> list[int]:
    """Returns the number of sentences to take of each source."""
    if config.counts:
        with prefix_errors(f"--counts={config.counts}"):
            return parse_numbers(config.counts, len(sources), int)
    if not config.weights:
        return [source.sentences for source in sources]
    with prefix_errors(f"--weights={config.weights}"):
        weights = parse_numbers(config.weights, len(sources))
    weighted = [(source.sentences, weight) for source, weight in zip(sources, weights) if weight]
    total = config.total or int(min(count * sum(weights) / weight for count, weight in weighted))
    return proportional(total, weights)


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
