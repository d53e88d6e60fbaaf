"""Tensors of a checkpoint that the graph has no place for: which of them change nothing, or are left out as asked."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from qwen_build.checkpoint.safetensors_file import STORAGE
from qwen_build.checkpoint.shards import some
from qwen_build.checkpoint.weights import Checkpoint
from qwen_engine.errors import BuildError

# pattern of names -> what they are: nothing that the next token depends on
HARMLESS = {
    "*rotary_emb.inv_freq": "rotary frequencies, which are computed from config.json",
    "*.attn.bias": "masks of attention",
    "*.attn.masked_bias": "masks of attention",
    "*.self_attn.masked_bias": "masks of attention",
    "*position_ids": "counters",
    "*num_batches_tracked": "counters",
    "*.k_scale": "scales of an FP8 cache",
    "*.v_scale": "scales of an FP8 cache",
    "*.q_scale": "scales of an FP8 cache",
    "v_head.*": "the value head of a reward model",
    "score.*": "the head of a classifier",
    "classifier.*": "the head of a classifier",
}
# the same where the graph ends in something else
WHOLE_HEAD = {"lm_head.*": "the head over the vocabulary"}
ZEROS = "biases of nothing but zeros"


def pass_over(
    needed: Collection[str], checkpoint: Checkpoint, ignored: Iterable[str], without_head: bool = False
) -> tuple[frozenset[str], tuple[str, ...]]:
    """The tensors that are left out, and a sentence about each kind of them.

    Args:
        needed: what the graph reads.
        ignored: patterns of ``--ignore-tensors``.
        without_head: whether the graph does without the head over the vocabulary.

    Raises:
        BuildError: a pattern matches no tensor, or one that is needed.
    """
    kinds: dict[str, list[str]] = {}
    passed = set()
    for pattern in ignored:
        matching = {name for name in checkpoint.tensors if fnmatchcase(name, pattern)}
        if not matching:
            raise BuildError(f"--ignore-tensors {pattern!r} matches no tensor of the checkpoint; leave it out")
        if wanted := sorted(matching.intersection(needed)):
            raise BuildError(f"--ignore-tensors {pattern!r} matches {some(wanted)}, which the graph needs")
        passed |= matching
    table = HARMLESS | (WHOLE_HEAD if without_head else {})
    harmless = {pattern: kind for pattern, kind in table.items() if not any(fnmatchcase(n, pattern) for n in needed)}
    for name in sorted(checkpoint.tensors.keys() - set(needed) - passed):
        kind = next((kind for pattern, kind in harmless.items() if fnmatchcase(name, pattern)), None)
        if kind is None and _is_zero_bias(name, checkpoint):
            kind = ZEROS
        if kind is not None:
            kinds.setdefault(kind, []).append(name)
            passed.add(name)
    return frozenset(passed), tuple(f"{some(names)} is left out: {kind}." for kind, names in kinds.items())


def _is_zero_bias(name: str, checkpoint: Checkpoint) -> bool:
    """Whether ``name`` is a bias that adds nothing; old AutoGPTQ gave one to each linear."""
    return name.endswith(".bias") and checkpoint.tensors[name].dtype in STORAGE and not checkpoint.read(name).any()
