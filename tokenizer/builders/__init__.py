"""Folders of images and videos to visual sentences: which images follow each other, and their codes as a stream.

May import: EasyLM.storage, EasyLM.data, tokenizer.media, tokenizer.sentence_files; never JAX, because worker processes
read images. The tokenizer's codec is passed in.

In the order in which data flows:
  file_index      FileIndex: the files of the input folders as items of rows
  samplers        which rows make an example
  kinds           KINDS, and the sentences of a range of examples
  arrangements    which image follows which: one function a kind
  settings        SentenceSettings of samplers and arrangements
  image_ref       ImageRef: an image that is not read yet
  views           how a file becomes pixels: plain, gray, masked, label colours, CO3D depth
  pipeline        reads and encodes the images of a stream of sentences
  code_cache      CodeCache: codes on disk for further epochs
  writing         the loop of a build: sentences, progress, report
  resumable_file  ResumableFile: a file that survives interruptions

Vocabulary:
  row      images of one thing, one from each input folder: an image, or an image and its annotations
  item     rows that belong together: a pair, the frames of a clip in order of time, the images of a class
  example  rows that become sentences; the unit of progress, shards and resuming
  shot     item of an example
  stride   step between the frames of a window of a clip
Shapes: n images, S the side in pixels, N codes of an image.
"""

from tokenizer.builders.file_index import FileIndex, InputFolder
from tokenizer.builders.image_ref import ImageRef
from tokenizer.builders.kinds import KINDS, Kind
from tokenizer.builders.resumable_file import ResumableFile
from tokenizer.builders.settings import SentenceSettings
from tokenizer.builders.writing import BuildPlan, Resources, write_sentences

__all__ = [
    "KINDS",
    "BuildPlan",
    "FileIndex",
    "ImageRef",
    "InputFolder",
    "Kind",
    "Resources",
    "ResumableFile",
    "SentenceSettings",
    "write_sentences",
]
