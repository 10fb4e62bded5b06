"""Estimates of KL(π‖π_ref) from x = log π − log π_ref (Schulman 2020), chosen at run time."""

import triton
import triton.language as tl

from .common import expm1, expm1_minus
from .options import ESTIMATOR_ABS, ESTIMATOR_K1, ESTIMATOR_K2


@triton.jit
def coefficient(ptr, number):
    """A coefficient on the device, or the number given."""
    if ptr is None:
        return number
    else:
        return tl.load(ptr).to(tl.float32)


@triton.jit
def clamp(x, low, high):
    """As torch.clamp: a NaN passes, so that it shows."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def kl_value(x, estimator):
    """k1, k2, k3 or abs of x, not clamped yet."""
    value = tl.where(estimator == ESTIMATOR_K2, 0.5 * x * x, expm1_minus(-x))
    value = tl.where(estimator == ESTIMATOR_K1, x, value)
    return tl.where(estimator == ESTIMATOR_ABS, tl.abs(x), value)


@triton.jit
def kl_slope(x, estimator):
    """The derivative of `kl_value`."""
    sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))  # 0, or NaN
    slope = tl.where(estimator == ESTIMATOR_K2, x, -expm1(-x))
    slope = tl.where(estimator == ESTIMATOR_K1, 1.0, slope)
    return tl.where(estimator == ESTIMATOR_ABS, sign, slope)
