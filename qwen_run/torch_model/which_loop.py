"""Which loop answers a call of ``generate``: the engine's own, or transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_run.api.generate_options import GenerateOptions

# What changes nothing in the engine's loop, whatever it is.
_WITHOUT_EFFECT = frozenset({"bos_token_id", "transformers_version", "_from_model_config", "tokenizer"})
# What changes nothing where it has this value.
_USUAL: Mapping[str, Any] = {
    "use_cache": True,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "synced_gpus": False,
}
# What transformers computes of padding too, and the engine's loop of a row's own tokens.
_OF_PADDING = frozenset({"no_repeat_ngram_size", "bad_words_ids", "forced_bos_token_id"})
KNOWN = frozenset(GenerateOptions.__dataclass_fields__) - {"inputs_embeds"} - _OF_PADDING


def engine_options(settings: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Those of ``options`` that the engine's loop has; None where only transformers' loop does what is asked.

    Args:
        settings: what a ``GenerationConfig`` says that differs from the defaults.
        options: keywords of ``generate``, which count before ``settings``.
    """
    asked = {name: value for name, value in {**settings, **options}.items() if value is not None}
    left = {
        name: value
        for name, value in asked.items()
        if name not in _WITHOUT_EFFECT and not (name in _USUAL and value == _USUAL[name])
    }
    draws = bool(left.get("do_sample")) and ("seed" not in left or left.get("num_beams", 1) > 1)
    if draws or not left.keys() <= KNOWN:
        return None
    return {name: value for name, value in left.items() if name in options}
