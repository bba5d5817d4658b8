"""Training data: turns JSONL files, packed files or text into a stream of tokens, and the stream into rows.

    JSONL or packed files -> token files -> token stream -> rows -> (mixture) -> batches (EasyLM.training.batches)
    text -> examples -> token store, a token stream -> ...

Imports EasyLM.storage, and no JAX, because worker processes import this room. Other rooms import the names below and
the modules `records`, `packed_file` and `tokenizer_names`.

Vocabulary:
  record       JSON object on one line of a JSONL file: {"tokens": base64}, or text fields
  sentence     the token ids of one record; a visual sentence is several images
  example      record as a unit of the stream
  token file   JSONL file with its line index, or packed file
  token stream all tokens of all files in order
  row          seq_length consecutive tokens with their targets: one sequence of a batch
  segment id   number of the sentence, in its row, to which a token belongs
  loss weight  0 or 1 for each token, in arrays called masks
  fingerprint  JSON values that are equal for equal data; a run resumes only on data of the same fingerprint
  T            tokens in a row
  N            tokens in a stream

Modules:
  protocols      interfaces: TokenStream, TokenFile, Examples, Tokenizer
  records        reads and writes records
  tokenizer_names  the tokenizer that records name; refuses mixtures
  record_fields  field lists, which select the parts of a record that become tokens
  line_index     index of the lines of a JSONL file
  jsonl_file     token file of a JSONL file
  packed_file    packed files: writes, reads, token file
  token_stream   token stream over files
  text_tokenizer SentencePiece and Hugging Face text tokenizers
  text_examples  examples from files and Hugging Face datasets
  token_store    token stream of tokenized text
  permutation    shuffles in constant memory
  token_rows     rows of a token stream
  mixture        rows of several sources in given proportions
  dataset        flags of a dataset, and their row source
"""

from EasyLM.data.dataset import DATASET_FLAGS, make_dataset
from EasyLM.data.mixture import parse_numbers, proportional
from EasyLM.data.permutation import permuted, shuffled_number
from EasyLM.data.text_tokenizer import TOKENIZER_FLAGS, load_tokenizer

__all__ = [
    "DATASET_FLAGS",
    "TOKENIZER_FLAGS",
    "load_tokenizer",
    "make_dataset",
    "parse_numbers",
    "permuted",
    "proportional",
    "shuffled_number",
]
