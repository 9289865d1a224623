"""Numerics of quantization: numpy arrays in, numpy arrays out; no graphs, no onnx."""
