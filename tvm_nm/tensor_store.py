"""Tensors of many batches, in memory as far as a budget goes and in temporary files beyond it. Needs NumPy only."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["StoredTensor", "TensorStore"]


class TensorStore:
    """Keeps arrays within a budget of memory. What does not fit is written to files that vanish with their tensors.

    Parameters
    ----------
    budget
        Bytes that may be held in memory.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.held = 0

    def put(self, array: NDArray[Any]) -> StoredTensor:
        """Take an array, which nobody may change afterwards."""
        return StoredTensor(self, array)


class StoredTensor:
    """An array in memory or in a file; `get` returns it."""

    def __init__(self, store: TensorStore, array: NDArray[Any]) -> None:
        self._store = store
        self._array: NDArray[Any] | None = None
        self._file: Any = None
        self._shape, self._dtype = array.shape, array.dtype
        if store.held + array.nbytes <= store.budget:
            self._array = array
            store.held += array.nbytes
        else:
            self._file = tempfile.TemporaryFile(prefix="tvm-nm-")  # noqa: SIM115  (closed with the tensor)
            np.ascontiguousarray(array).tofile(self._file)

    def get(self) -> NDArray[Any]:
        """Return the array; must not be changed."""
        if self._array is not None:
            return self._array
        self._file.seek(0)
        return np.fromfile(self._file, self._dtype).reshape(self._shape)

    def __del__(self) -> None:
        if self._array is not None:
            self._store.held -= self._array.nbytes
        elif self._file is not None:
            self._file.close()
