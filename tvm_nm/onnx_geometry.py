"""What ONNX operators say of the size of their outputs, where TVM's converters pass over it or misread it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tvm_nm.errors import UnsupportedModelError

__all__ = ["resized_shape", "write_transposed_padding"]


def write_transposed_padding(shape: Sequence[int], kernel: Sequence[int], attributes: dict[str, Any]) -> None:
    """Write what ``output_shape`` of a ConvTranspose means into its ``pads`` and ``output_padding``.

    Parameters
    ----------
    shape, kernel
        Of the input and of the kernel, without batch and channels.
    attributes
        The node's, which are changed.
    """
    wanted = attributes.pop("output_shape", None)
    if wanted is None:
        return
    ones, zeros = [1] * len(shape), [0] * len(shape)
    extra = list(attributes.get("output_padding", zeros))
    upper = attributes.pop("auto_pad", b"NOTSET") == b"SAME_UPPER"
    before, after = [], []
    sizes = zip(
        *(shape, kernel, attributes.get("strides", ones), attributes.get("dilations", ones), wanted[-len(shape) :]),
        strict=True,
    )
    for axis, (size, width, stride, dilation, out) in enumerate(sizes):
        total = stride * (size - 1) + extra[axis] + (width - 1) * dilation + 1 - out
        if total < 0:
            extra[axis], total = extra[axis] - total, 0
        before.append(total // 2 if upper else total - total // 2)
        after.append(total - before[-1])
    attributes["pads"], attributes["output_padding"] = [*before, *after], extra


def resized_shape(
    shape: Sequence[int], scales: Sequence[float] | None, sizes: Sequence[int] | None, attributes: dict[str, Any]
) -> list[int]:
    """Return the shape of what a Resize or Upsample makes of an input.

    Parameters
    ----------
    shape
        The whole input's.
    scales, sizes
        One of the two, for the node's ``axes``.
    attributes
        The node's; ``axes`` is taken out.

    Raises
    ------
    UnsupportedModelError
        If TVM would compute something else: it knows sizes only, and resizes nothing but space.
    """
    if attributes.get("antialias") or attributes.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise UnsupportedModelError("antialias and keep_aspect_ratio_policy are not supported; export without them")
    axes = [axis % len(shape) for axis in attributes.pop("axes", range(len(shape)))]
    given = scales if sizes is None else sizes
    if given is None or len(given) != len(axes):
        raise UnsupportedModelError("it needs a scale or a size for each axis; export the model again")
    result = list(shape)
    mode = attributes.get("coordinate_transformation_mode", b"half_pixel")
    for axis, value in zip(axes, given, strict=True):
        if sizes is not None:
            result[axis] = int(value)
            continue
        exact = np.float32(value) * np.float32(shape[axis])
        result[axis] = int(exact)
        # Coordinates follow from the scale, and TVM takes the ratio of the sizes for it.
        if abs(exact - result[axis]) > 1e-4 * max(1.0, exact) and mode not in (b"align_corners", b"tf_crop_and_resize"):
            raise UnsupportedModelError(
                f"scale {value:g} of {shape[axis]} pixels gives no whole number of them; export it with sizes"
            )
    if result[:2] != list(shape[:2]):
        raise UnsupportedModelError("it resizes the batch or the channels; only space can be resized")
    return result
