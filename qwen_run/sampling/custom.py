"""What a caller lays on the choice of tokens: functions of its own, texts that may not come, tokens that alone may."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_engine.errors import RequestError, shown

# (ids of the answer so far, logits) or (ids of the prompt, ids of the answer so far, logits) -> logits (vocab_size,)
LogitsProcessor = Callable[..., Any]


def is_processor(value: Any) -> bool:
    """``value`` can be called as a logits processor."""
    return callable(value) and (_is_transformers(value) or _num_arguments(value) in (2, 3))


def apply_processors(
    processors: Sequence[LogitsProcessor], prompt: Sequence[int], output: Sequence[int], logits: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What ``processors``, in their order, make of ``logits`` (vocab_size,), which they may change.

    Raises:
        RequestError: one does not return as many numbers.
    """
    for processor in processors:
        if _is_transformers(processor):
            returned = _call_transformers(processor, [*prompt, *output], logits)
        elif _num_arguments(processor) == 3:
            returned = processor(list(prompt), list(output), logits)
        else:
            returned = processor(list(output), logits)
        logits = _as_logits(returned, len(logits), processor)
    return logits


def forbidden_tokens(bad_words: Sequence[Sequence[int]], output: Sequence[int]) -> list[int]:
    """The tokens that would complete one of ``bad_words``, none of them empty, at the end of ``output``."""
    return [word[-1] for word in bad_words if ends_with(output, word[:-1])]


def ends_with(output: Sequence[int], ids: Sequence[int]) -> bool:
    """The last of ``output`` are ``ids``."""
    return not ids or list(output[-len(ids) :]) == list(ids)


def _call_transformers(processor: LogitsProcessor, ids: list[int], logits: NDArray[np.float32]) -> Any:
    """``processor`` sees tensors of a batch of one; who has made one has imported torch."""
    torch: Any = sys.modules["torch"]
    scores = torch.from_numpy(logits[np.newaxis].copy())
    return processor(torch.tensor([ids]), scores)[0]


def _is_transformers(processor: Any) -> bool:
    """Of a class of transformers, such as ``LogitsProcessorList``, seen without importing it."""
    return any(kind.__module__.partition(".")[0] == "transformers" for kind in type(processor).__mro__)


def _num_arguments(processor: Any) -> int:
    try:
        parameters = inspect.signature(processor).parameters.values()
    except (TypeError, ValueError):  # built in: nobody knows
        return 2
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each for each in parameters if each.kind in positional and each.default is inspect.Parameter.empty]
    is_open = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters)
    return max(2, len(needed)) if is_open else len(needed)


def _as_logits(returned: Any, size: int, processor: LogitsProcessor) -> NDArray[np.float32]:
    try:
        logits = np.asarray(returned, np.float32)
    except (TypeError, ValueError, RuntimeError):
        logits = np.empty(0, np.float32)
    if logits.shape != (size,):
        name = getattr(processor, "__name__", type(processor).__name__)
        raise RequestError(f"logits processor {name} has returned {shown(returned)}, expected {size} logits")
    return logits
