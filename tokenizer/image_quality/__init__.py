"""Metrics of image quality against references, and of codebook usage.

May import: EasyLM.storage, tokenizer.formats, tokenizer.vqgan. Only the modules lpips and inception require JAX; import
them as modules.

    psnr_ssim   mean squared error, PSNR, SSIM
    lpips       perceptual distance from features of VGG16
    inception   features of InceptionV3 for FID
    fid         statistics of features and the Frechet distance between two sets
    code_usage  share of the codebook in use, perplexity of the codes

Vocabulary: a reference is the image with which another one is compared. FID compares two sets of images, all other
metrics compare two images. rFID is the FID of reconstructions (encoded and decoded images) against their originals.

Shapes: n, N images, B images of a batch, H W pixels, h w positions of a layer, C channels, D features, K codes.
"""

from tokenizer.image_quality.code_usage import code_usage
from tokenizer.image_quality.fid import FeatureStatistics, frechet_distance, warn_if_few
from tokenizer.image_quality.psnr_ssim import mse, psnr, ssim

__all__ = ["FeatureStatistics", "code_usage", "frechet_distance", "mse", "psnr", "ssim", "warn_if_few"]
