"""Distances, one number a sample, and the weights of the consistency losses. t > r are the two times of a pair."""

from collections.abc import Callable

import torch

from onejump.types import PerSample, Samples, Times

Distance = Callable[[Samples, Samples], PerSample]
Weight = Callable[[Times, Times], PerSample]


def mean_l1(x: Samples, y: Samples) -> PerSample:
    """mean |x - y| over all elements of a sample. CM's `l1`."""
    return (x - y).flatten(1).abs().mean(1)


def mean_l2(x: Samples, y: Samples) -> PerSample:
    """mean (x - y)^2 over all elements of a sample. CM's `l2`."""
    return (x - y).flatten(1).square().mean(1)


def squared_l2(x: Samples, y: Samples) -> PerSample:
    """||x - y||^2, summed over the whole image."""
    return (x - y).flatten(1).square().sum(1)


def pseudo_huber(x: Samples, y: Samples, c: float) -> PerSample:
    """sqrt(||x - y||^2 + c^2) - c on the norm of the whole image, not per element (Song & Dhariwal 2024).

    c = 0 is the norm itself, with gradient 0 at x = y.
    """
    if c == 0:
        return torch.linalg.vector_norm((x - y).flatten(1), dim=1)
    return (squared_l2(x, y) + c**2).sqrt() - c


def inverse_delta(t: Times, r: Times) -> PerSample:
    """1 / (t - r). iCT; ECT and TCM on CIFAR-10 (omega(t) = 1)."""
    return 1 / (t - r)


def inverse_sqrt_delta(t: Times, r: Times) -> PerSample:
    """1 / sqrt(t - r)."""
    return 1 / (t - r).sqrt()


def inverse_c_out(t: Times, r: Times, sigma_data: float = 0.5) -> PerSample:
    """1 / c_out(t)."""
    return (1 / t**2 + 1 / sigma_data**2).sqrt()


def inverse_c_out_squared(t: Times, r: Times, sigma_data: float = 0.5) -> PerSample:
    """1 / c_out(t)^2 = 1/t^2 + 1/sigma_data^2. ECT and TCM's released command line on ImageNet-64; CM's `karras`."""
    return 1 / t**2 + 1 / sigma_data**2


def t_over_c_out_squared_delta(t: Times, r: Times, sigma_data: float = 0.5) -> PerSample:
    """omega(t) / Delta_t with omega(t) = t / c_out(t)^2. The TCM paper's statement for ImageNet-64."""
    return t * (1 / t**2 + 1 / sigma_data**2) / (t - r)


def snr(t: Times, r: Times) -> PerSample:
    """1 / t^2, the signal-to-noise ratio. CM's `snr`."""
    return 1 / t**2


def snr_plus_one(t: Times, r: Times) -> PerSample:
    """1 / t^2 + 1. CM's `snr+1`."""
    return 1 / t**2 + 1


def truncated_snr(t: Times, r: Times) -> PerSample:
    """max(1 / t^2, 1). CM's `truncated-snr`."""
    return (1 / t**2).clamp_min(1)


def uniform(t: Times, r: Times) -> PerSample:
    """1. CM's and CTM's default."""
    return torch.ones_like(t)
