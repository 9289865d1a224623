"""Sample inputs: arrays and their files, images, sound, token ids, ONNX test data, functions.

A sample is a feed: one array for each input of the model. Files are read when they are asked for.
"""

from __future__ import annotations

from onnxq.data.fitting import describe, fitted
from onnxq.data.opening import Spec, open_samples
from onnxq.data.options import ImageOptions
from onnxq.data.samples import LABELS, Feed, Samples

__all__ = [
    "LABELS",
    "Feed",
    "ImageOptions",
    "Samples",
    "Spec",
    "describe",
    "fitted",
    "open_samples",
]
