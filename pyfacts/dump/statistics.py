"""Per-feature statistics, as the writer stores and the reader checks them."""

from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
    """Of the stored values of every feature: their number int64, sum and sum of squares float64, maximum float32."""

    nnz: np.ndarray
    sum: np.ndarray
    sum_sq: np.ndarray
    max: np.ndarray


def new_statistics(width: int) -> Statistics:
    """Those of no values."""
    return Statistics(
        nnz=np.zeros(width, np.int64),
        sum=np.zeros(width, np.float64),
        sum_sq=np.zeros(width, np.float64),
        max=np.full(width, -np.inf, np.float32),
    )
