"""Models, and the attention, losses and generation that they share.

May import EasyLM's own modules only. `attention` may import this room; `llama` also `storage`, `data`, `checkpoints`,
`parallel` and `training`. Imports nothing here: `--help` of a command must not import JAX.

Shapes are suffixes of names, one letter an axis (`q_BTHK`):
  B batch: rows, or prompts          D hidden size             P tokens of a prompt, padded on the left
  T tokens of a row; queries         F feed-forward size       C candidates of a prompt; chunks of a row
  S keys; slots of a cache           H heads                   N new tokens of a candidate
  t, s tokens of a chunk             K head dimension          V vocabulary
A lower-case letter is a part of the axis in upper case; a digit is an axis of that size.

Vocabulary:
  context: the arguments that all blocks of a forward pass share.
  mask: which keys a query attends to; 1 for a token, 0 for padding.
  prompt, candidate: generation continues each prompt several times; the candidates share the prompt's cache.
  slot: the position of a new token in the candidates' cache.

Modules:
  attention/: causal self-attention.
  llama/: the LLaMA and its commands.
  losses: cross-entropy and accuracy.
  generate: generation with a cache, for any model.
  sampling: temperature, top-k, top-p.
  chunks: chunks along time.
  tuning: hardware-specific forms of plain operations.
"""
