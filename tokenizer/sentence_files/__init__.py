"""Reads, mixes, selects, summarizes and renders files of visual sentences.

May import: EasyLM.storage, EasyLM.data, tokenizer.media, tokenizer.image_quality.code_usage; never JAX.

  reader        read_sentences: the sentences of a file in any format
  selection     selects sentences by number and kind
  rendering     writes decoded sentences as image files, videos or one HTML page
  parts         refuses incomplete sharded builds
  answers       excludes the images of pairs from the loss
  mixing        mixes sentences of several sources in random order
  disk_shuffle  shuffles lines in bounded memory
  disk_space    checks the free space for an output
  summary       statistics of sentences, as a table and as charts

Vocabulary:
  sentence  the ids of one record, and its JSON object with further fields such as `kind` and `sources`
  bad line  a line that is not a record; its address is `file:line`
  source    an input of a mixture: the files of one path or glob
Shapes: n images of a sentence, S the side in pixels, N codes of an image.
"""

from tokenizer.sentence_files.reader import read_sentences

__all__ = ["read_sentences"]
