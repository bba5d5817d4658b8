"""The token ids of a Large Vision Model: VQGAN codes first, then special ids."""

CODEBOOK_SIZE = 8192  # ids 0..8191 are VQGAN codes
NUM_SPECIAL_IDS = 100  # ids 8192..8291
VOCAB_SIZE = CODEBOOK_SIZE + NUM_SPECIAL_IDS
TOKENS_PER_IMAGE = 256  # of the released VQGAN, 16x16 codes; for other models it follows from their config

# At least CODEBOOK_SIZE: generation that stops at a VQGAN code stops inside an image.
BOS = 8192
EOS = 8193
PAD = 8192
