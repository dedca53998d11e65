"""Compile ONNX CNNs to sparse TVM modules that run faster on CPUs than dense runtimes."""

__version__ = "0.1.0"
