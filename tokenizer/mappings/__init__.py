"""Sentences that define their own mapping, made from synthetic scenes: `python -m tokenizer.mappings`.

May import: EasyLM.storage, EasyLM.data, tokenizer.media, tokenizer.formats, tokenizer.synthetic, tokenizer.builders;
the command also tokenizer.vqgan. The other modules import no JAX, because worker processes import them. Import the
modules.

In the order of the data flow:
    held_out   what no training sentence contains: colours of classes, exchanges, geometries, compositions, rooms
    steps      the steps of mappings: recolour, mark, turn, ...
    mappings   draws a mapping of a family
    pool       scenes, clips and photographs that are rendered once
    sentences  composes sentences of images from a pool
    writing    encodes them and writes the file
    __main__   the command

Vocabulary: a mapping makes the answer of a pair from its input; all pairs of a sentence have the same mapping. A family
is a set of mappings. `tokenizer.synthetic` defines scene, clip and split.
"""
