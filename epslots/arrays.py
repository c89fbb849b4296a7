"""Names for numpy arrays, by the kind of their items."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
Float32Array = NDArray[np.float32]

NO_EXPERTS: IntArray = np.zeros(0, np.int64)
