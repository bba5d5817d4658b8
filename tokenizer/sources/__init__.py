"""Sources of images and videos: where the inputs of a build are listed, and where the bytes of an input are.

May import: EasyLM.storage, tokenizer.media; never JAX. Import the modules: `from tokenizer.sources import detection`.
This file imports nothing, because worker processes import only `reading` and have to start fast.

  items      Item, a listed input, and Source, the protocol of a listing
  detection  which source a path, glob or URL names
  local      folders of files on this machine
  remote     folders of files in a file system of fsspec: s3://, gs://, hf://, ...
  tars       tar files (WebDataset), read at random by the offsets of their members
  tables     parquet files, and folders of `datasets.Dataset.save_to_disk`
  table_files  the files of tables, and their cells
  container_files  the files of a source of containers, one by one
  reading    the bytes of an item
  keep_list  the names of the images that `tokenizer.filter` keeps

Vocabulary:
  item       one image or video of a source, with the name that it would have as a file in a folder
  container  a file that holds many items: a tar, a parquet file, an arrow file
  member     an item in a container
  address    what messages and records call an item: `cats/1.png`, `000.tar!cats/1.png`, `a.parquet!17.image`
  location   where a member is in its container, so that no reader has to look for it; empty for a file
  sample     the members of a tar whose paths are equal up to the first dot of the file name
  key        the rest of such a path: `jpg`, `seg.png`
  column     the position of an item among the images of its row. A source with two keys has two columns.
"""
