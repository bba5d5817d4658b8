"""Builds visual sentences from images and videos.

May import: EasyLM.storage, EasyLM.data, tokenizer.media, tokenizer.sources, tokenizer.formats; `shards` also
EasyLM.parallel, the others never JAX. The codec is passed in.
Import the modules: `from tokenizer.builders import views`. This file imports nothing, because worker processes import
only `image_ref` and have to start fast.

In the order of the data flow:
  inputs          the sources that a kind needs, from the values of the flags
  file_index      FileIndex: the files of the sources as items of rows
  mixture_file    the data sets of `--inputs`
  division        Division: the parts of a build
  claims          gives out the parts to processes
  schedule        the order of the examples of a build
  samplers        select the rows of an example
  kinds           KINDS, DataSet, and the sentences of examples
  arrangements    order the images of a sentence: one function per kind
  settings        SentenceSettings of samplers and arrangements
  image_ref       ImageRef: a reference to an image
  views           turn a file into pixels: plain, gray, masked, label colours, CO3D depth
  pipeline        reads and encodes the images of a stream of sentences
  code_cache      CodeCache: codes on disk for later epochs
  writing         the loop of a build: sentences, progress, report
  output          OutputFile: the output of a build, one of these two
  resumable_file  ResumableFile: a local file that an interrupted build resumes
  uploaded_file   UploadedFile: a file on an object store, uploaded when it is complete
  shards          the parts of a build that a process does (imports JAX: not for worker processes)

Vocabulary:
  row      one image from each column of the sources, such as an image with its annotations
  item     rows that belong together: a pair, the frames of a clip in temporal order, or the images of a class
  example  the rows of one or more sentences; the unit of progress, of shards and of resuming
  shot     an item of an example
  stride   the step between the frames of a window of a clip
Shapes: n images, S the side in pixels, N codes of an image.
"""
