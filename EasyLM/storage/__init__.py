"""Files, local or remote (through fsspec), and the formats that several rooms share. Imports no other room, and no JAX.

Vocabulary:
  version  size and modification mark of a file; changes when the file is written
  digest   hash of 16 hexadecimal digits, equal for equal files or equal settings
  column   one-dimensional array in a column file
  cache    column file that is derived from a source: a line index, tokenized text; lies beside it, if that is local

Modules:
  atomic   write a file completely or not at all; JSON files
  remote   file systems of fsspec: their errors, listings and globs
  paths    globs and comma lists of paths, file versions, checks of outputs
  reading  open files, read lines, decompress
  checksums  CRC-32 checksums of arrays
  digests  digests of JSON values and of files
  heartbeat_lock  one process at a time holds a directory or writes a file
  lock_file  the file of a lock
  processes  which process has written a file, and whether it still exists
  hub      names on the Hugging Face Hub in place of local paths
  json_files  JSON files, bounded and checked with a schema
  columns  memory-mapped column files, cached or standalone
  pickles  what makes reading a pickle safe
  torch_file  tensors in the files of torch.save, read without torch
"""

from EasyLM.storage.atomic import (
    atomic_file,
    atomic_path,
    flush_to_disk,
    flush_tree_to_disk,
    names_full_disk,
    remove_leftovers,
    scratch_folder,
    write_json,
)
from EasyLM.storage.columns import VERIFIED_ONCE_BYTES, Columns, cached_columns, open_columns, write_columns
from EasyLM.storage.digests import content_digest, json_digest, same_contents
from EasyLM.storage.heartbeat_lock import HeartbeatLock, LockedError, LockWatch, lock_output, lock_output_folder
from EasyLM.storage.hub import is_hub_name, local_path, path_on_disk, split_revision
from EasyLM.storage.json_files import MOST_BYTES, check_schema, parse_json, read_json
from EasyLM.storage.paths import (
    absolute_path,
    check_output,
    check_plain_file,
    expand_path_groups,
    expand_paths,
    file_version,
    is_compressed,
    make_directory,
    path_exists,
    split_paths,
)
from EasyLM.storage.pickles import Unchangeable, check_memo
from EasyLM.storage.processes import is_running, owner_tag
from EasyLM.storage.reading import (
    byte_reader,
    check_line_start,
    check_no_pointer,
    open_binary,
    read_lines,
    read_text_lines,
)
from EasyLM.storage.remote import (
    is_remote,
    is_remote_folder,
    names_store_errors,
    remote_file_system,
    remote_glob,
    walk_remote,
)
from EasyLM.storage.torch_file import TorchTensor, read_torch_file

__all__ = [
    "MOST_BYTES",
    "VERIFIED_ONCE_BYTES",
    "Columns",
    "HeartbeatLock",
    "LockWatch",
    "LockedError",
    "TorchTensor",
    "Unchangeable",
    "absolute_path",
    "atomic_file",
    "atomic_path",
    "byte_reader",
    "cached_columns",
    "check_line_start",
    "check_memo",
    "check_no_pointer",
    "check_output",
    "check_plain_file",
    "check_schema",
    "content_digest",
    "expand_path_groups",
    "expand_paths",
    "file_version",
    "flush_to_disk",
    "flush_tree_to_disk",
    "is_compressed",
    "is_hub_name",
    "is_remote",
    "is_remote_folder",
    "is_running",
    "json_digest",
    "local_path",
    "lock_output",
    "lock_output_folder",
    "make_directory",
    "names_full_disk",
    "names_store_errors",
    "open_binary",
    "open_columns",
    "owner_tag",
    "parse_json",
    "path_exists",
    "path_on_disk",
    "read_json",
    "read_lines",
    "read_text_lines",
    "read_torch_file",
    "remote_file_system",
    "remote_glob",
    "remove_leftovers",
    "same_contents",
    "scratch_folder",
    "split_paths",
    "split_revision",
    "walk_remote",
    "write_columns",
    "write_json",
]
