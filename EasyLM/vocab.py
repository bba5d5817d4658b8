"""The token ids of a Large Vision Model: VQGAN codes first, then special ids."""

CODEBOOK_SIZE = 8192  # ids 0..8191 are VQGAN codes
NUM_SPECIAL_IDS = 100  # ids 8192..8291
VOCAB_SIZE = CODEBOOK_SIZE + NUM_SPECIAL_IDS
TOKENS_PER_IMAGE = 256  # 16x16 codes of the released VQGAN; the config of another VQGAN gives its own number

# Special ids are not VQGAN codes. If they were, generation could stop inside an image.
BOS = 8192
EOS = 8193
PAD = 8192
