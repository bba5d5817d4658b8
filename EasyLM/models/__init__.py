"""Models, and the parts that they share: attention, losses and generation.

May import only the modules directly in EasyLM; `attention` and `llama` state what they may import. Import the modules:
this file imports nothing.

The suffix of an array's name gives its shape, with one letter per axis (`q_BTHK`):
  B batch: rows, or prompts          D hidden size             P tokens of a prompt, padded on the left
  T tokens of a row; queries         F feed-forward size       C candidates of a prompt; chunks of a row
  S keys; slots of a cache           H heads                   N new tokens of a candidate
  R heads of queries in a group      G heads of keys, values
  t, s tokens of a chunk             K head dimension          V vocabulary
A lower-case letter is a part of the axis with that upper-case letter. A digit is an axis of that size.

Vocabulary:
  context: the arguments that all blocks of a forward pass share.
  mask: selects the keys that a query attends to. In a token mask, 1 is a token and 0 is padding.
  document: a sentence, or a part of one, in a row of several. Segment ids number the documents of a row.
  prompt, candidate: a candidate is one continuation of a prompt. All candidates share the prompt's cache.
  slot: the index of a new token in the candidates' cache.

Modules:
  attention/: causal self-attention.
  llama/: the LLaMA model and its commands.
  losses: cross-entropy and accuracy.
  generate: generation with a key-value cache, for any model.
  sampling: temperature, top-k, top-p.
  chunks: splits arrays along time.
  tuning: operations in forms that are faster on certain hardware.
"""
