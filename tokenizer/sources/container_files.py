"""The files of a source of containers, one by one."""

import dataclasses
import itertools
import os

from EasyLM.errors import UserError
from tokenizer.sources.items import Source
from tokenizer.sources.local import Subfolders
from tokenizer.sources.tables import Tables
from tokenizer.sources.tars import Tars


def paths_of(source: Source) -> list[str]:
    """Returns the paths of the tars or tables of a source.

    Raises:
      UserError: naming the flag, if it is a folder of files.
    """
    if isinstance(source, Subfolders):
        return paths_of(source.source)
    if isinstance(source, Tars | Tables):
        return list(source.paths)
    raise UserError(f"{source.flag}: is a folder of files, not of tars or tables: give the number of parts")


def names_of(source: Source) -> dict[str, str]:
    """Returns what keep lists call the tars or tables of a source, by their paths; empty: it is a folder of files.

    The names are those of the files. If two of them are equal, the names are the paths within the folder that holds all
    of them. They do not depend on where the source lies.
    """
    if not isinstance(source, Tars | Tables):
        return {}
    names = {path: os.path.basename(path) for path in source.paths}
    if len(set(names.values())) == len(names):
        return names
    parts = {path: path.split("/") for path in source.paths}
    common = itertools.takewhile(lambda folders: len(set(folders)) == 1, zip(*parts.values()))
    depth = len(list(common))
    return {path: "/".join(parts[path][depth:]) for path in source.paths}


def only_file(source: Source, path: str) -> Source:
    """Returns the source with one of its files alone."""
    if isinstance(source, Subfolders):
        return dataclasses.replace(source, source=only_file(source.source, path))
    assert isinstance(source, Tars | Tables)
    return dataclasses.replace(source, paths=[path])
