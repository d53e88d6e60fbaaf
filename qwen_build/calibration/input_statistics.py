"""What calibration remembers of the inputs that linears read: arrays in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SAMPLE_TOKENS = 512

# Rows of a second moment that are updated at a time.
_PANEL_ROWS = 1024


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Of one input x (K) over the calibration tokens.

    Attributes:
        tokens: how many.
        largest: float32 (K), the largest magnitude.
        mean_square: float32 (K).
        sample: float32 (up to 512, K), the x of evenly spread tokens.
        second_moment: float32 (K, K), the mean of x xᵀ; None if nobody asked for it.
        held_out: float32 (up to 512, K), the x of tokens that nothing else here has seen; None if nobody asked.
    """

    tokens: int
    largest: np.ndarray
    mean_square: np.ndarray
    sample: np.ndarray
    second_moment: np.ndarray | None
    held_out: np.ndarray | None = None

    def divided(self, factors: np.ndarray) -> InputStatistics:
        """The statistics of x / ``factors`` (K)."""
        second_moment = self.second_moment
        if second_moment is not None:
            second_moment = second_moment / factors
            second_moment /= factors[:, None]
        return InputStatistics(
            self.tokens,
            self.largest / factors,
            self.mean_square / np.square(factors),
            self.sample / factors,
            second_moment,
            None if self.held_out is None else self.held_out / factors,
        )

    def output_error(self, weight: np.ndarray, other: np.ndarray) -> float:
        """Squared error of ``other`` relative to ``weight``, both (N, K): ``|(W - V) x|² / |W x|²`` over the sample."""
        whole = self.output_square(weight)
        return self.output_square(weight - other) / whole if whole else 0.0

    def output_square(self, weight: np.ndarray) -> float:
        """``|W x|²`` for ``weight`` (N, K), summed over the sample."""
        return float(np.square(self.sample @ weight.T).sum(dtype=np.float64))


class Collector:
    """Adds up the :class:`InputStatistics` of an input that comes in batches.

    Args:
        in_features: K.
        held_out: bool (tokens) of all that will come, those that are kept apart.
        with_second_moment: whether to take K x K floats of memory for it.
    """

    def __init__(self, in_features: int, held_out: np.ndarray, with_second_moment: bool) -> None:
        self._held_out, self._seen = held_out, 0
        self._tokens = int(len(held_out) - held_out.sum())
        self._largest = np.zeros(in_features, np.float32)
        self._squares = np.zeros(in_features, np.float64)
        self._sample = _Sample(np.flatnonzero(~held_out), in_features)
        self._kept_apart = _Sample(np.flatnonzero(held_out), in_features)
        self._second_moment = np.zeros((in_features, in_features), np.float32) if with_second_moment else None

    def add(self, x: np.ndarray) -> None:
        """The next tokens, float32 (T, K)."""
        for sample in (self._sample, self._kept_apart):
            sample.add(x, self._seen)
        apart = self._held_out[self._seen : self._seen + len(x)]
        self._seen += len(x)
        if apart.any():
            x = x[~apart]
        np.maximum(self._largest, np.abs(x).max(axis=0, initial=0), out=self._largest)
        self._squares += np.square(x).sum(axis=0, dtype=np.float64)
        if (sums := self._second_moment) is not None:
            for start in range(0, len(sums), _PANEL_ROWS):  # on and above the diagonal; the rest is its mirror image
                stop = start + _PANEL_ROWS
                sums[start:stop, start:] += x[:, start:stop].T @ x[:, start:]

    def finish(self) -> InputStatistics:
        """The statistics of all tokens; the collector's memory becomes theirs."""
        assert self._seen == len(self._held_out), f"{self._seen} tokens came, expected {len(self._held_out)}"
        if (sums := self._second_moment) is not None:
            sums /= self._tokens
            for start in range(0, len(sums), _PANEL_ROWS):
                stop = start + _PANEL_ROWS
                sums[stop:, start:stop] = sums[start:stop, stop:].T
        mean_square = (self._squares / self._tokens).astype(np.float32)
        held_out = self._kept_apart.rows if self._held_out.any() else None
        return InputStatistics(self._tokens, self._largest, mean_square, self._sample.rows, sums, held_out)


class _Sample:
    """Some evenly spread ones of ``tokens``, the numbers of those that it may take."""

    def __init__(self, tokens: np.ndarray, in_features: int) -> None:
        count = min(len(tokens), SAMPLE_TOKENS)
        self._numbers = tokens[np.linspace(0, max(len(tokens) - 1, 0), count).astype(np.int64)]
        self.rows = np.empty((count, in_features), np.float32)

    def add(self, x: np.ndarray, first: int) -> None:
        """The tokens from number ``first`` on."""
        here = (self._numbers >= first) & (self._numbers < first + len(x))
        self.rows[here] = x[self._numbers[here] - first]
