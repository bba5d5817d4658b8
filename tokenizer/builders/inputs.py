"""The sources of a kind's columns, from the values of the flags."""

from EasyLM.errors import UserError
from EasyLM.storage import split_paths
from tokenizer.builders.kinds import KINDS
from tokenizer.media import images, videos
from tokenizer.sources import detection
from tokenizer.sources.items import Source
from tokenizer.sources.local import Subfolders

_LEAST_COLUMNS = {"none": 1, "one": 2, "many": 2}


def find_sources(kind: str, input_dir: str, target_dir: str, keys: str, columns: str) -> list[Source]:
    """Returns the sources of a kind of sentences. Together they have the columns of its rows.

    Args:
      kind: a key of KINDS.
      input_dir: a source; see `detection.find_source`.
      target_dir: further sources, a comma list; empty: the input's keys or columns are the targets.
      keys: comma list of keys of tars: for one source its columns, for several sources one each, or one for all.
      columns: comma list of columns of tables, likewise.

    Raises:
      UserError: naming the flag, if a source does not exist, or their number does not fit the kind.
    """
    needs = KINDS[kind].targets
    extensions = videos.VIDEO_EXTENSIONS if KINDS[kind].is_video else images.IMAGE_EXTENSIONS
    if keys and columns:
        raise UserError(f"--keys={keys} and --columns={columns}: keys are for tars, columns for tables: give one")
    if target_dir and needs == "none":
        raise UserError(f"--target_dir={target_dir}: --kind={kind} has no targets: leave it out")
    chosen, flag = (keys, "keys") if keys else (columns, "columns")
    names = _split(chosen)
    if KINDS[kind].subfolders:
        if names:
            raise UserError(f"--{flag}={chosen}: --kind={kind} finds its images by the names of their folders")
        return [Subfolders(detection.find_source(input_dir, "input_dir", extensions), KINDS[kind].subfolders)]
    targets = split_paths(target_dir)
    if needs == "one" and len(targets) > 1:
        raise UserError(f"--target_dir={target_dir}: --kind={kind} takes one folder")
    values = [(input_dir, "input_dir")]
    values += [(target, "target_dir") for target in targets]
    if len(values) == 1:
        names_by_source = [names]
    elif len(names) in (0, 1, len(values)):
        names_by_source = [names] * len(values) if len(names) < 2 else [(name,) for name in names]
    else:
        raise UserError(f"--{flag}={chosen}: must be one, or one for each of the {len(values)} inputs")
    count = sum(max(len(names), 1) for names in names_by_source)
    if count < _LEAST_COLUMNS[needs]:
        raise UserError(f"--target_dir is missing: --kind={kind} needs it, or several --keys or --columns")
    if needs != "many" and count > _LEAST_COLUMNS[needs]:
        raise UserError(f"--{flag}={chosen}: --kind={kind} takes {_LEAST_COLUMNS[needs]}")
    selections = [((of_source, ()) if keys else ((), of_source)) for of_source in names_by_source]
    return [
        detection.find_source(value, flag_name, extensions, *selection)
        for (value, flag_name), selection in zip(values, selections)
    ]


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
