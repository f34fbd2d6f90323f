"""The engine: torch code that turns a directory into a directory. It never imports web, queue, SQL or storage code."""

import os

# Libraries that report to their makers, ONNX Runtime since 1.32 by default, ask for this before they are imported. In
# the sandbox nothing leaves anyway; without one, and in tests and benchmarks, nothing must either.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
