"""What filter rearrangement did to each layer: one row of a report. Needs no TVM."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LayerRearrangement", "RearrangementReport"]


@dataclass(frozen=True, slots=True)
class LayerRearrangement:
    """A layer before and after.

    Attributes
    ----------
    name
        The layer's name.
    pattern
        Text form of the sparsity pattern that the plan has for it; empty where it is not pruned.
    kept_before, kept_after
        Share of the sum of absolute weights, or of what weights are worth on calibration images, that the pattern's
        mask keeps in the original order and in the new one; 1 where the layer is not pruned.
    outputs_free, inputs_free
        How many of its output and input channels may move at all.
    outputs_moved, inputs_moved
        How many do not stand where they stood.
    outputs_note, inputs_note
        Why channels stay; empty where all may move.
    """

    name: str
    pattern: str
    kept_before: float
    kept_after: float
    outputs_free: int
    inputs_free: int
    outputs_moved: int
    inputs_moved: int
    outputs_note: str
    inputs_note: str


@dataclass(frozen=True, slots=True)
class RearrangementReport:
    """What became of a network.

    Attributes
    ----------
    method
        How the order was searched.
    seconds
        Time that it took.
    layers
        All layers in binding order.
    measure
        What the kept shares are shares of.
    """

    method: str
    seconds: float
    layers: tuple[LayerRearrangement, ...]
    measure: str = "L1 norm"

    @property
    def kept(self) -> tuple[float, float]:
        """Mean share of saliency kept before and after, over the pruned layers; 1 where there are none."""
        pruned = [layer for layer in self.layers if layer.pattern]
        if not pruned:
            return 1.0, 1.0
        before = sum(layer.kept_before for layer in pruned) / len(pruned)
        return before, sum(layer.kept_after for layer in pruned) / len(pruned)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> RearrangementReport:
        """Read the text that `to_json` writes."""
        data = json.loads(text)
        layers = tuple(LayerRearrangement(**entry) for entry in data.pop("layers"))
        return cls(**data, layers=layers)
