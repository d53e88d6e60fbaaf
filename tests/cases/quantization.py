"""Which weights the kernels have, and models of transformers whose weights are rounded."""

from __future__ import annotations

import copy
from typing import Any

from qwen_build.quantization.scheme_table import KERNELS, SCHEMES
from qwen_build.quantization.schemes import Scheme, dequantize

# (scheme, kernels): every scheme with every kernels that hold weights of its bits
STORED = [
    (quant, kernels)
    for kernels, row in KERNELS.items()
    for quant, scheme in SCHEMES.items()
    if scheme.bits in row.bits or quant == "none"
]

# matrices that stay float
ROUTERS = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")


def stored_as(scheme: Scheme, parameter: Any) -> Any:
    """What ``scheme`` makes of a parameter (..., out_features, in_features) of a model of transformers."""
    import torch

    weight = parameter.detach().numpy().reshape(-1, parameter.shape[-1])  # those of experts, one after the other
    rounded = dequantize(scheme, scheme.quantize(weight), weight.shape)
    return torch.tensor(rounded.reshape(parameter.shape))


def dequantised(model: Any, scheme: Scheme, embedding: Scheme | None = None) -> Any:
    """A copy of ``model`` whose linears hold what ``scheme`` makes of them, embedding and head of ``embedding``."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith(ROUTERS):
            outer = name.startswith(("model.embed_tokens", "lm_head"))
            parameter.data = stored_as(embedding if embedding and outer else scheme, parameter)
    return model
