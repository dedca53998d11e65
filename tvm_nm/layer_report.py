"""What became of each layer of a built model: one row of the report, the manifest and the benchmark."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LayerReport"]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One convolution or fully connected layer of a built module.

    Attributes
    ----------
    name
        The ONNX node's name.
    kind
        `conv` or `fc`.
    workload
        Shape in words, such as `64->64 56x56 k3x3`.
    epilogue
        What belongs to the layer beside the convolution, such as `bias+add+relu`.
    pattern
        Sparsity pattern that the kernel exploits; `dense` where it exploits none.
    density
        Share of the weights that are not zero.
    kernel
        Kernel variant in words.
    function
        Name of the PrimFunc; layers of equal kernels share one. The k-th call of any layer's function in a run belongs
        to the k-th report of those with an empty `chain`.
    macs, kept_macs
        Multiply-accumulates of the dense layer, and those that the kernel executes.
    packed_bytes
        Size of packed values and indices, as they are stored.
    note
        Why a layer with zeros stayed dense; empty otherwise.
    shape
        All of the layer's shape, as `tvm_nm.layer_shape.LayerShape` reads it.
    tuning
        Where the kernel variant comes from: `measured` on this machine, `interpolated` from measurements, `shipped`
        with the package, or `default` for a layer that was never tuned.
    chain
        Name of the layer whose call computes this one as well (see `tvm_nm.schedules.chain`); empty for a layer with a
        call of its own, and for the first of a chain.
    pool
        Name of the function that is called right after the layer's and takes its epilogue's maxima; empty where there
        are none or the layer's own function takes them.
    task, variant
        What the tuning database calls the computation and the kernel (see `tvm_nm.tuning.database`); empty for layers
        that are not tuned. Those of a chain are at its first layer.
    """

    name: str
    kind: str
    workload: str
    epilogue: str
    pattern: str
    density: float
    kernel: str
    function: str
    macs: int
    kept_macs: int
    packed_bytes: int
    note: str = ""
    shape: str = ""
    tuning: str = "default"
    chain: str = ""
    pool: str = ""
    task: str = ""
    variant: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return asdict(self)
