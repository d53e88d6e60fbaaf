"""What builder and runtime agree on: the manifest, the graph's inputs and outputs, the error tree."""

import os

__version__ = "0.1.0"

# ONNX Runtime's official builds report to their maker from the moment they are imported; 1.31 reads this switch then,
# and no value but 1 or true switches it off. All packages import this one first.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
