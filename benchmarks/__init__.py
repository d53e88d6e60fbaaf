"""Measurements anyone can repeat; they assert nothing and print what they mean. Last outputs in results/."""

import qwen_engine  # noqa: F401 - switches ONNX Runtime's telemetry off before a benchmark imports it
