"""The token ids of a Large Vision Model: image codes first, special ids after them."""

CODEBOOK_SIZE = 8192  # ids 0..8191 are VQGAN codes
NUM_SPECIAL_IDS = 100  # ids 8192..8291
VOCAB_SIZE = CODEBOOK_SIZE + NUM_SPECIAL_IDS
TOKENS_PER_IMAGE = 256  # of the released tokenizer, 16x16 codes; of others it follows from their config

# Never below CODEBOOK_SIZE: a generation that stops at an image code stops inside an image.
BOS = 8192
EOS = 8193
PAD = 8192
