"""The ONNX backend suite through clean-up and the default recipe.

Clean-up of all of them (a third of the real architectures), the default recipe on some: all by
`python tests/bench/bench_backend.py`.
"""

from __future__ import annotations

from itertools import chain, islice

import numpy as np
import onnx
from backend_cases import (
    Case,
    converted_cases,
    judged,
    light_cases,
    node_cases,
    quantized,
    verdict,
)

EACH = 24  # node models through the default recipe: most have no weight


def test_cleanup_keeps_interface_and_results_of_node_models() -> None:
    verdicts = {case.name: verdict(case) for case in node_cases()}
    assert not {k: v for k, v in verdicts.items() if v not in ("same", "not run")}
    assert sum(v == "same" for v in verdicts.values()) > 0.99 * len(verdicts)


def test_cleanup_keeps_interface_and_results_of_converted_models() -> None:
    verdicts = {case.name: verdict(case) for case in converted_cases()}
    assert not {k: v for k, v in verdicts.items() if v not in ("same", "not run")}


def test_cleanup_keeps_interface_and_results_of_real_architectures() -> None:
    verdicts = {case.name: verdict(case) for case in islice(light_cases(), 0, None, 3)}
    assert set(verdicts.values()) == {"same"}, verdicts


def test_the_default_recipe_gives_a_valid_model_or_a_reason() -> None:
    """Anything but an OnnxqError fails here by itself."""
    texts = [
        quantized(case) for case in chain(islice(node_cases(), 0, None, EACH), converted_cases())
    ]
    assert "quantized" in texts  # most have no constant weight


def test_the_verdict_can_be_bad() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    other = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Neg(x) }'
    )
    case = Case("relu", model, {"x": np.array([1.0, -1.0], np.float32)})
    assert verdict(case) == "same"
    assert judged(case, other).startswith("outputs differ")
    other.graph.output[0].name = "z"
    assert judged(case, other) == "the outputs differ"
