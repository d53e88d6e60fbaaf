"""Which weights the kernels have."""

from __future__ import annotations

from qwen_build.quantization.scheme_table import KERNELS, SCHEMES

# (scheme, kernels): every scheme with every kernels that hold weights of its bits
STORED = [
    (quant, kernels)
    for kernels, row in KERNELS.items()
    for quant, scheme in SCHEMES.items()
    if scheme.bits in row.bits or quant == "none"
]
