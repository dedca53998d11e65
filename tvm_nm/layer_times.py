"""What layers take inside a network, and what share of the processor's peak that is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvm_nm.layer_bench import LayerAlone
    from tvm_nm.layer_report import LayerReport

__all__ = ["LayerTime", "mean_share_of_peak", "pruned_layers"]


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Time of a layer, of the calls of another function, or of the virtual machine's own work, in one inference.

    Attributes
    ----------
    name
        The layer's or function's name, or ``other``.
    layer
        What is known of the layer; None for anything else.
    calls
        Calls in one inference.
    time_us
        Median over the inferences measured.
    peak_gflops
        The FMA peak of the same run: median of readings between the inferences.
    alone
        The layer by itself, sparse and dense, if that was measured.
    """

    name: str
    layer: LayerReport | None
    calls: int
    time_us: float
    peak_gflops: float = 0.0
    alone: LayerAlone | None = None

    @property
    def gflops(self) -> float:
        """Multiplications and additions that the kernel executes, in 1e9 a second; 0 for what is no layer."""
        return 2e-3 * self.layer.kept_macs / self.time_us if self.layer and self.time_us else 0.0

    @property
    def share_of_peak(self) -> float:
        """Operations with weights that are not zero, a second, over the FMA peak; 0 for what is no layer."""
        if self.layer is None or not self.time_us or not self.peak_gflops:
            return 0.0
        return 2e-3 * self.layer.macs * self.layer.density / self.time_us / self.peak_gflops


def pruned_layers(times: Sequence[LayerTime]) -> tuple[LayerTime, ...]:
    """Return the layers with zeros among their weights, whatever kernels they have."""
    return tuple(time for time in times if time.layer is not None and time.layer.density < 1)


def mean_share_of_peak(times: Sequence[LayerTime]) -> float:
    """Return the geometric mean of some layers' shares of the FMA peak; 0 where one of them is not known."""
    if not all(time.share_of_peak for time in times):
        return 0.0
    return statistics.geometric_mean(time.share_of_peak for time in times)
