"""Rounding a weight to small integers, one scale and zero point for each group of inputs: arithmetic, no storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_run.engine_files.stored_rows import dequantized

# From scales (out_features, groups) and the zero points beside them (None: symmetric) to the nearest scales that can be
# stored.
Storable = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


@dataclass(frozen=True)
class Rounded:
    """``weight ~= scale * (q - zero_point)`` for a weight (out_features, in_features).

    Attributes:
        q: uint8 (out_features, groups, group_size); in_features are padded with zeros to whole groups.
        scales: float32 (out_features, groups).
        zero_points: uint8 (out_features, groups); None if all are 2**(bits-1).
    """

    q: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None


def joined(
    pieces: Sequence[np.ndarray | Rounded], join: Callable[[list[np.ndarray]], np.ndarray]
) -> np.ndarray | Rounded:
    """Pieces of one weight, their outputs as ``join`` puts them together; all are rounded, or none."""
    rounded = [piece for piece in pieces if isinstance(piece, Rounded)]
    if not rounded:
        return join([piece for piece in pieces if isinstance(piece, np.ndarray)])
    assert len(rounded) == len(pieces), "what is fused is rounded alike"
    zero_points = [piece.zero_points for piece in rounded if piece.zero_points is not None]
    return Rounded(
        join([piece.q for piece in rounded]),
        join([piece.scales for piece in rounded]),
        join(zero_points) if zero_points else None,
    )


@dataclass(frozen=True)
class Grid:
    """Integers of ``bits`` bits (4 or 8) in groups of ``group_size`` inputs of one output.

    A symmetric grid has its middle, 2**(bits-1), at 0; another one stretches from the smallest to the largest weight
    of the group, shifted so that 0 lies on it.

    ``weight_scales``: each "group" has a scale of its own, or, on a symmetric grid, the groups of an output ("channel")
    or of the whole weight ("tensor") have the same one. "tensor" rounds whole weights only, no slices of their rows.
    """

    bits: int
    group_size: int
    symmetric: bool
    weight_scales: str = "group"

    def round(self, weight: np.ndarray, storable: Storable = lambda scales, zero_points: scales) -> Rounded:
        """Round ``weight`` (out_features, in_features) float32 to the nearest values, without calibration.

        Args:
            storable: rounds the scales to some that can be stored, before anything is rounded with them.
        """
        padding = -weight.shape[1] % self.group_size
        groups = (np.pad(weight, ((0, 0), (0, padding))) if padding else weight).reshape(
            len(weight), -1, self.group_size
        )
        lowest, highest = groups.min(axis=-1), groups.max(axis=-1)
        if self.symmetric:
            highest = self.shared(np.maximum(highest, -lowest))
        return self.within(groups, lowest, highest, storable)

    def within(
        self,
        groups: np.ndarray,
        lowest: np.ndarray,
        highest: np.ndarray,
        storable: Storable,
    ) -> Rounded:
        """Round ``groups`` (N, groups, group_size) to grids that reach from ``lowest`` to ``highest`` (N, groups)."""
        return self.nearest(groups, *self.reaching(lowest, highest, storable))

    def reaching(
        self, lowest: np.ndarray, highest: np.ndarray, storable: Storable
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales and zero points of grids that reach from ``lowest`` to ``highest`` (N, groups).

        Zero is always between them; a symmetric grid reaches as far down as up, and ``lowest`` does not matter.
        """
        if self.symmetric:
            return positive(storable(highest / (self.middle - 1), None)), None
        lowest, highest = lowest.clip(max=0), highest.clip(min=0)
        scales = (highest - lowest) / self.most
        for _ in range(2):  # a zero point belongs to the scale that is stored, which may depend on it
            zero_points = np.rint(-lowest / positive(scales)).clip(max=self.most).astype(np.uint8)
            scales = storable(scales, zero_points)
        return positive(scales), zero_points

    def nearest(self, groups: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None) -> Rounded:
        """Round ``groups`` (N, groups, group_size) to the nearest values of given grids, see :class:`Rounded`."""
        q = groups / scales[..., None]
        np.rint(q, out=q)
        q += self.middle if zero_points is None else zero_points[..., None]
        np.clip(q, 0, self.most, out=q)
        return Rounded(q.astype(np.uint8), scales, zero_points)

    def values(self, rounded: Rounded, in_features: int) -> np.ndarray:
        """The weight that ``rounded`` stands for, float32 (out_features, in_features)."""
        return dequantized(rounded.q, rounded.scales, rounded.zero_points, self.bits)[:, :in_features]

    def shared(self, largest: np.ndarray) -> np.ndarray:
        """``largest`` (out_features, groups), each replaced by the largest of the groups that share its scale."""
        if self.weight_scales == "group":
            return largest
        axis = 1 if self.weight_scales == "channel" else None
        return np.broadcast_to(largest.max(axis, keepdims=True), largest.shape)

    @property
    def most(self) -> int:
        """The largest q."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)


def positive(scales: np.ndarray) -> np.ndarray:
    """Replace the scale of an all-zero group, or one whose reciprocal would overflow, by 1."""
    return np.where(scales > 1e-37, scales, np.float32(1))
