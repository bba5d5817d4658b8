"""Figures of answers: perplexity, its unigram baseline, picture error."""

import numpy as np


def mse(pictures: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Mean squared error of each picture; both [B, H, W, 3] in [0, 1]. Shape [B]."""
    assert pictures.shape == truths.shape
    return np.square(np.asarray(pictures, np.float64) - truths).mean(axis=(1, 2, 3))


def perplexity(log_likelihoods_BN: np.ndarray) -> np.ndarray:
    """exp(mean negative log-likelihood) of each example's tokens. Shape [B]."""
    return np.exp(-np.asarray(log_likelihoods_BN, np.float64).mean(axis=1))


def unigram_log_likelihoods(tokens_BN: np.ndarray, codes: int) -> np.ndarray:
    """Log-likelihood of each example's tokens under the token frequencies of all other examples. Shape [B, N].

    Add-one smoothing over `codes` ids. Leaving the example itself out keeps the baseline from knowing the answer.
    """
    counts_BV = np.stack([np.bincount(tokens, minlength=codes) for tokens in tokens_BN])
    others_BV = counts_BV.sum(axis=0)[None, :] - counts_BV + 1
    likelihoods_BV = others_BV / others_BV.sum(axis=1, keepdims=True)
    return np.log(np.take_along_axis(likelihoods_BV, tokens_BN, axis=1))


def with_standard_error(values: np.ndarray) -> dict[str, float]:
    """Mean over examples and its standard error."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "standard_error": float(error)}
