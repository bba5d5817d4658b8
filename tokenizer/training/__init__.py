"""The objective, the discriminator and the images for training a VQGAN. The loop is in EasyLM.training.

May import EasyLM.data, EasyLM.storage, tokenizer.media, tokenizer.vqgan and tokenizer.image_quality.

    objective       initial state, loss and gradients, evaluation, optimizer
    losses          loss terms of images
    code_losses     CodeLoss: commitment, codebook, entropy
    codebook        codes as running means; replacement of unused codes
    discriminator   patch discriminator, adversarial loss, adaptive weight
    image_rows      images of folders as a row source
    model_flags     the architecture as flags

Vocabulary:
    hidden          the encoder's vectors before quantization
    chosen          the code vector of each hidden vector
    reconstructed   the decoder's image
    cell            the square of pixels that corresponds to a code
    generator       the VQGAN, as the opponent of the discriminator; generator loss: what it minimizes against it
    logit           the discriminator's output for a patch, positive where it looks real
    average         the running mean of the network; it is evaluated and exported

Shapes: as in tokenizer.vqgan; in the discriminator h w are patches.
"""

from tokenizer.training.code_losses import CODEBOOK_UPDATES, CodeLoss
from tokenizer.training.discriminator import DISCRIMINATOR_FLAGS, AdversarialLoss
from tokenizer.training.image_rows import ImageRows
from tokenizer.training.model_flags import MODEL_FLAGS, config_from_flags
from tokenizer.training.objective import Objective, learning_rate, make_model

__all__ = [
    "CODEBOOK_UPDATES",
    "DISCRIMINATOR_FLAGS",
    "MODEL_FLAGS",
    "AdversarialLoss",
    "CodeLoss",
    "ImageRows",
    "Objective",
    "config_from_flags",
    "learning_rate",
    "make_model",
]
