"""The two formats of FP8 and their limits."""

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNED = 16
"""The hardware multiplies FP8 along multiples of it only."""
BELOW = {E4M3: 8, E5M2: 15}
"""Exponent of the largest number of each format, which is 1.75 times a power of two."""
FLOOR = 27
"""Least exponent field of a largest magnitude, 2^-100: scales and their inverses stay normal numbers."""
