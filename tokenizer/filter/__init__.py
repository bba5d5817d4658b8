"""Which images of a source to train on: `python -m tokenizer.filter`.

May import: EasyLM.storage, tokenizer.media, tokenizer.sources, tokenizer.builders. Only the command imports JAX,
because worker processes import `measuring` and have to start fast. Import the modules.

In the order of the data flow:
    listing       the images of a source, each with the file of its scores
    scores        scores of an image: fields of a JSON file beside it, columns of its row in a table
    measuring     what a worker measures of an image: sides, bytes, contrast, hashes, scores
    measurements  a file of measurements: written by workers, resumable; the parts of a sharded one
    rules         the rules that judge an image by itself
    near_hashes   hashes that differ in a few bits, among any number of them
    decision      the reason of each image: a rule, a blocklist, a duplicate; or none: it is kept
    report        writes the keep list, counts, examples and a picture of them
    __main__      the command

Vocabulary:
    measurement      a JSON object: the name and the properties of an image
    perceptual hash  64 bits that change little when an image is resized or compressed again
    distance         the number of bits in which two perceptual hashes differ
    reason           the flag that drops an image, as a user would type it: `--min_side=64`
    keep list        the names of the images that no rule drops (`tokenizer.sources.keep_list`)
Shapes: n images, numbered in the order of the measurements.
"""
