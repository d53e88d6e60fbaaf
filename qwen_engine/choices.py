"""The choices of a build by name, for command lines and settings that must not import what implements them."""

from __future__ import annotations

QUANTS = ("none", "int8", "int6", "int5", "int4")
MIXED = ("int4-mixed",)
CALIBRATED = ("smoothquant",)
AUTO = "auto"
GROUP_SIZES = (32, 64, 128)
KERNELS = ("native", "stock")
ACTIVATIONS = ("int8", "int8x2", "float32")
INT4_METHODS = ("rtn", "awq", "gptq", "auto")
WEIGHT_SCALES = ("group", "channel", "tensor")
ACTIVATION_SCALES = ("group", "block", "token", "static")
CACHE_DTYPES = ("float32", "float16", "int8")
