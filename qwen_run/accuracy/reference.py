"""What Hugging Face transformers says: the reference that an engine's accuracy is measured against.

Two references answer two questions. The checkpoint's own weights (``recipe`` None) say what rounding costs. The weights
that the engine holds (a :class:`Recipe`) say whether it computes with them what was meant; whether they are the right
ones is seen without computing, see ``weight_checks.py``.

This is the only module that imports torch and transformers, inside functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from qwen_engine.errors import CheckpointError, RequestError, first_line
from qwen_engine.graph_io import CHOSEN, HEAD, LOGITS
from qwen_engine.manifest import MergedAdapter, Quantization
from qwen_run.accuracy.builder_weights import BuilderWeights, open_weights
from qwen_run.accuracy.checkpoint_weights import CheckpointWeights
from qwen_run.accuracy.gguf_weights import GgufWeights
from qwen_run.accuracy.logits import FullLogits, ReferenceLogits, compare, following_tokens, positions_of
from qwen_run.accuracy.qwen1_names import config_of
from qwen_run.accuracy.recipe import Recipe
from qwen_run.accuracy.reference_experts import expert_linears, place_of, round_experts, routed_as
from qwen_run.accuracy.rounded_inputs import ROUNDING_STEPS, round_activations, rounding, rounding_hook
from qwen_run.engine_files.weights import EngineWeights, slices

# Positions whose logits are in memory at a time.
CHUNK_TOKENS = 128

# The name of a module's input is that of the module and this; the name of its output is the module's own.
INPUT = ".input"

# name of a parameter, some of its rows, their values
Pieces = Iterable[tuple[str, slice, np.ndarray]]


@dataclass(frozen=True)
class RoundingCost:
    """A reference with an engine's weights that rounds the inputs of linears as the engine does, on one sequence.

    Attributes:
        rounding_kl: sum over positions of KL(inputs as they are || rounded), in nats; 0 where none are rounded.
        original_kl: the same of KL(the checkpoint's weights || rounded).
        log_likelihood: sum of those of the tokens that follow.
    """

    rounding_kl: float
    original_kl: float
    log_likelihood: float


class Reference(Protocol):
    """Somebody who knows the right answer, live or from a file."""

    def logits(self, token_ids: Sequence[int], every: int = 1) -> Iterator[ReferenceLogits]:
        """The logits of the positions of one sequence, ``CHUNK_TOKENS`` at a time, in order.

        Args:
            every: of every so many positions the last, see :func:`positions_of`.
        """

    def rounded(self, token_ids: Sequence[int], original: Sequence[ReferenceLogits]) -> RoundingCost:
        """What rounding as the engine is meant to round costs one sequence.

        Args:
            original: the logits of the checkpoint's own weights at every position, in chunks.
        """

    def continuation(self, prompt: Sequence[int], max_new_tokens: int, stop_token_ids: Set[int]) -> list[int]:
        """The greedy continuation of ``prompt``; a stop token that ends it is its last."""


class HuggingFace:
    """A checkpoint in transformers.

    Args:
        checkpoint: the directory; its weights are held in memory once, in ``dtype``.
        threads: threads torch uses, in all of this process.
        recipe: take an engine's weights, and round keys and values as it does, and inputs of linears while
            ``rounds_inputs`` is True; None for the checkpoint's own weights.
        dtype: what it computes in, by torch's name; all but :meth:`stream_batch` is meant for float32.
        rope_scaling: JSON of the rope object in place of the checkpoint's, see ``Origin`` of the manifest.
        adapters: what is merged into the checkpoint's weights.

    Raises:
        RequestError: torch or transformers is not installed.
        CheckpointError: transformers cannot load the directory.
        EngineError: the weights of the engine cannot be read.
    """

    def __init__(
        self,
        checkpoint: Path,
        threads: int,
        recipe: Recipe | None = None,
        dtype: str = "float32",
        rope_scaling: str | None = None,
        adapters: Sequence[MergedAdapter] = (),
    ) -> None:
        self._torch, self._transformers = _import_torch_and_transformers()
        self._torch.set_num_threads(threads)
        try:
            self._model = self._load(checkpoint, getattr(self._torch, dtype), rope_scaling, adapters).eval()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = first_line(error)
            raise CheckpointError(f"transformers cannot load {checkpoint}: {reason}") from error
        self._cache_dtype = "float32"
        self.rounds_inputs = True
        self._rounded_input: tuple[Any, Any, Any] = (None, None, None)
        self._kept: dict[tuple[tuple[int, ...], bool], Any] = {}
        if recipe is not None:
            self._cache_dtype = recipe.cache_dtype
            self._compute_as(recipe)

    def logits(self, token_ids: Sequence[int], every: int = 1) -> Iterator[FullLogits]:
        """See :meth:`Reference.logits`: chunks of (up to ``CHUNK_TOKENS``, vocab_size) float32."""
        hidden = self._states(token_ids)[positions_of(len(token_ids), every)]
        for start in range(0, len(hidden), CHUNK_TOKENS):
            yield FullLogits(self._head(hidden[start : start + CHUNK_TOKENS]))

    def rounded(self, token_ids: Sequence[int], original: Sequence[ReferenceLogits]) -> RoundingCost:
        following = following_tokens(token_ids)
        sums = np.zeros(3)
        with self._rounding(False):
            exact = self._states(token_ids)
        with self._rounding(True):
            states = self._states(token_ids)
        for start, beside in zip(range(0, len(token_ids), CHUNK_TOKENS), original, strict=True):
            rows = slice(start, start + CHUNK_TOKENS)
            with self._rounding(False):
                unrounded = FullLogits(self._head(exact[rows]))
            with self._rounding(True):
                found = self._head(states[rows])
            to_original = compare(beside, found, following[rows])
            sums += compare(unrounded, found, following[rows]).kl.sum(), to_original.kl.sum(), 0.0
            sums[2] += to_original.log_likelihood.sum()
        return RoundingCost(*sums.tolist())

    def continuation(self, prompt: Sequence[int], max_new_tokens: int, stop_token_ids: Set[int]) -> list[int]:
        return list(self.stream(prompt, max_new_tokens, stop_token_ids))

    def stream(self, prompt: Sequence[int], max_new_tokens: int, stop_token_ids: Set[int]) -> Iterator[int]:
        """The tokens of :meth:`continuation`, each as soon as it is known: for measuring time."""
        cache = self._new_cache()
        fed = prompt
        for _ in range(max_new_tokens):
            token_id = int(self._head(self._hidden(fed, cache)[-1:])[0].argmax())
            yield token_id
            if token_id in stop_token_ids:
                return
            fed = [token_id]

    def stream_batch(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[list[int]]:
        """Greedy tokens of all ``prompts`` together, one of each a step, past any end of sequence.

        The batch is static, as in ``transformers.generate``: shorter prompts are padded on the left.
        """
        torch = self._torch
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        fed = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        columns = torch.arange(longest + max_new_tokens)
        padding = longest - lengths[:, None]
        mask = (columns >= padding).long() if int(padding.max()) else None
        cache = self._new_cache()
        stop = longest
        for _ in range(max_new_tokens):
            with torch.inference_mode():
                logits = self._model(
                    fed,
                    attention_mask=None if mask is None else mask[:, :stop],
                    position_ids=(columns[stop - fed.shape[1] : stop] - padding).clamp(min=0),
                    past_key_values=cache,
                    logits_to_keep=1,
                ).logits
            fed = logits[:, -1].argmax(-1, keepdim=True)
            yield fed[:, 0].tolist()
            stop += 1

    def hidden_outputs(
        self, token_ids: Sequence[int], names: Iterable[str], given: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """What an engine's ``layers.onnx`` exposes: the outputs of modules, and inputs of some.

        Args:
            names: of its outputs, ``logits`` among them.
            given: what the engine has at each of these names. Every sub-block then reads the engine's values instead of
                those computed here, so that errors do not add up: a sub-block that differs is itself at fault.

        Returns:
            (tokens, features) float32 of each of ``names``; of a router the experts it chose, (tokens, k) int32.
        """
        seen: dict[str, np.ndarray] = {}

        def exchange(name: str, tensor: Any) -> Any:
            seen[name] = tensor.flatten(0, -2).numpy()
            return tensor if given is None else self._torch.tensor(given[name]).reshape(tensor.shape)

        def on_input(name: str) -> Any:
            return lambda module, arguments: (exchange(name, arguments[0]), *arguments[1:])

        def on_router(name: str) -> Any:
            def hook(module: Any, arguments: tuple[Any, ...], output: Any) -> Any:
                seen[name] = output[2].numpy().astype(np.int32)
                return output if given is None else routed_as(self._torch, module, output, given[name])

            return hook

        def on_output(name: str) -> Any:
            def hook(module: Any, arguments: tuple[Any, ...], output: Any) -> Any:
                if isinstance(output, tuple):  # attention: with its weights
                    return exchange(name, output[0]), *output[1:]
                return exchange(name, output)

            return hook

        hooks = []
        for name in names:
            if name == LOGITS:
                continue
            module = self._model.get_submodule(name.removesuffix(INPUT).removesuffix(CHOSEN))
            if name.endswith(CHOSEN):
                hooks.append(module.register_forward_hook(on_router(name)))
            elif name.endswith(INPUT):  # as it is before the hook that rounds it
                hooks.append(module.register_forward_pre_hook(on_input(name), prepend=True))
            else:
                hooks.append(module.register_forward_hook(on_output(name)))
        try:
            hidden = self._hidden(token_ids, self._new_cache())
        finally:
            for hook in hooks:
                hook.remove()
        return seen | {LOGITS: self._head(hidden)}

    @contextmanager
    def _rounding(self, inputs: bool) -> Iterator[None]:
        before, self.rounds_inputs = self.rounds_inputs, inputs
        try:
            yield
        finally:
            self.rounds_inputs = before

    def _states(self, token_ids: Sequence[int]) -> Any:
        """The last norm's output for a whole sequence, a tensor (tokens, hidden_size); the last one is kept."""
        asked = tuple(token_ids), self.rounds_inputs
        if asked not in self._kept:
            self._kept = {asked: self._hidden(token_ids, self._new_cache())}
        return self._kept[asked]

    def _hidden(self, token_ids: Sequence[int], cache: Any) -> Any:
        """The last norm's output for new tokens, a tensor (tokens, hidden_size)."""
        with self._torch.inference_mode():
            return self._model.model(self._torch.tensor([list(token_ids)]), past_key_values=cache).last_hidden_state[0]

    def _head(self, hidden: Any) -> np.ndarray:
        with self._torch.inference_mode():
            logits: np.ndarray = self._model.lm_head(hidden).numpy()
        return logits

    def _new_cache(self) -> Any:
        cache = self._transformers.DynamicCache(config=self._model.config)
        if self._cache_dtype != "float32":
            update = cache.update
            cache.update = lambda key, value, *rest, **named: update(
                self._as_cached(key), self._as_cached(value), *rest, **named
            )
        return cache

    def _as_cached(self, x: Any) -> Any:
        """Keys or values (..., head_dim) rounded as the cache holds them."""
        if self._cache_dtype == "int8":
            return round_activations(self._torch, x, x.shape[-1], ROUNDING_STEPS["int8"])
        return x.half().float()

    def _load(self, checkpoint: Path, dtype: Any, rope_scaling: str | None, adapters: Sequence[MergedAdapter]) -> Any:
        """The model of ``checkpoint``; transformers itself reads packed weights and adapters with other packages."""
        auto = self._transformers.AutoModelForCausalLM
        config, is_known = config_of(checkpoint, self._transformers)
        if rope_scaling is not None:
            config.rope_parameters = json.loads(rope_scaling)
        packed = getattr(config, "quantization_config", None) is not None
        if is_known and not packed and not adapters:
            return auto.from_pretrained(checkpoint, config=config, dtype=dtype, local_files_only=True)
        if packed:
            del config.quantization_config
        weights = open_weights(checkpoint, adapters)
        if isinstance(weights, BuilderWeights):
            config.vocab_size, config.tie_word_embeddings = weights.vocab_size, weights.tied
        model = auto.from_config(config, dtype=dtype)
        self._fill(model, _checkpoint_pieces(model, weights))
        return model

    def _compute_as(self, recipe: Recipe) -> None:
        """Give the model the weights of an engine, and have its linears round their inputs as the engine's do."""
        weights = EngineWeights(recipe.engine)
        if self._model.config.tie_word_embeddings and not weights.head_is_shared:
            self._model.lm_head.weight = self._torch.nn.Parameter(self._model.lm_head.weight.detach().clone())
        self._fill(self._model, _engine_pieces(weights))
        round_experts(self._torch, self._model, recipe, self._rounding_of_experts)
        modules = dict(self._model.named_modules())
        for name, quantization in recipe.quantizations.items():
            module = modules.get(name)  # there is none of an expert
            if quantization.activations in ROUNDING_STEPS and isinstance(module, self._torch.nn.Linear):
                stored = weights.linears[weights.parts[name].owner]
                hook = rounding_hook(self._torch, quantization, stored)
                alone = stored.permutation is not None or quantization.activation_scales == "static"
                kind = name if alone else (
                    quantization.activations, quantization.activation_scales, quantization.group_size,
                )  # fmt: skip
                module.register_forward_pre_hook(partial(self._round_input, hook, kind))

    def _rounding_of_experts(self, quantization: Quantization) -> Callable[[Any], Any]:
        if quantization.activations not in ROUNDING_STEPS:
            return lambda x: x
        rounded = rounding(self._torch, quantization)
        return lambda x: rounded(x) if self.rounds_inputs else x

    def _round_input(self, hook: Any, kind: Any, module: Any, arguments: tuple[Any, ...]) -> Any:
        """``arguments`` rounded by ``hook``; linears that read one tensor and round it alike (``kind``) share that."""
        if not self.rounds_inputs:
            return None
        if self._rounded_input[0] is not arguments[0] or self._rounded_input[1] != kind:
            self._rounded_input = arguments[0], kind, hook(module, arguments)
        return self._rounded_input[2]

    def _fill(self, model: Any, pieces: Pieces) -> None:
        """Set all parameters of ``model``, each piece of which comes once."""
        unset = {name: parameter.numel() for name, parameter in model.named_parameters()}
        for name, rows, values in pieces:
            owner, place = place_of(model, name)
            place[rows] = self._torch.tensor(values)
            unset[owner] -= values.size
        assert not any(unset.values()), [name for name, elements in unset.items() if elements]


def _checkpoint_pieces(model: Any, weights: CheckpointWeights | GgufWeights | BuilderWeights) -> Pieces:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            yield name, slice(None), weights.vector(name)
            continue
        linear = name.removesuffix(".weight")
        own = [(linear, parameter.shape)] if parameter.dim() == 2 else expert_linears(name, parameter)
        yield from ((f"{one}.weight", rows, weights.rows(one, rows)) for one, shape in own for rows in slices(*shape))


def _engine_pieces(weights: EngineWeights) -> Pieces:
    for name, vector in weights.vectors.items():
        yield name, slice(None), vector
    for name in weights.parts:
        if name != HEAD or not weights.head_is_shared:
            yield from ((f"{name}.weight", rows, values) for rows, values in weights.pieces(name))


def _import_torch_and_transformers() -> tuple[ModuleType, ModuleType]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise RequestError(
            f"torch and transformers are needed ({error}); run pip install 'torch>=2.4' 'transformers>=5.0'"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers
