"""The files of a source of containers, one by one."""

import dataclasses

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


def only_file(source: Source, path: str) -> Source:
    """Returns the source with one of its files alone."""
    if isinstance(source, Subfolders):
        return dataclasses.replace(source, source=only_file(source.source, path))
    assert isinstance(source, Tars | Tables)
    return dataclasses.replace(source, paths=[path])
