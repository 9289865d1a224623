"""Job: which of the caller's overrides found a layer in any pass of a run, and time spent."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxq.job import Job
from onnxq.model import Model
from onnxq.passes import QuantizeWeights, drop_noops


def two_layers() -> Model:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[n, 32] x) => (float[n, 32] y) { [one] h = MatMul(x, v)  [two] y = MatMul(h, w) }"""
    )
    for name in ("v", "w"):
        proto.graph.initializer.append(numpy_helper.from_array(np.eye(32, dtype=np.float32), name))
    return Model.from_proto(proto)


def weights(*layers: str) -> QuantizeWeights:
    return QuantizeWeights(layers=layers)


OVERRIDES = [
    pytest.param(("one=float",), ("one=float",), None, id="matched"),
    pytest.param(("oen=float",), ("oen=float",), "did you mean 'one'", id="unmatched"),
    pytest.param((), ("op:LSTM=float",), None, id="the-recipe's-own"),
    pytest.param(("three=int8",), ("op:GRU=float", "three=int8"), "'three=int8'", id="beside"),
    pytest.param(("one=float",), (), None, id="no-pass-takes-it"),
]


@pytest.mark.parametrize(("asked", "layers", "warning"), OVERRIDES)
def test_warnings_are_for_what_the_caller_asked(
    asked: tuple[str, ...], layers: tuple[str, ...], warning: str | None
) -> None:
    job = Job(None, asked)
    job.run(weights(*layers), two_layers())
    if warning is None:
        assert job.unmatched == []
    else:
        (text,) = job.unmatched
        assert warning in text


def test_one_pass_that_finds_it_is_enough() -> None:
    """Whichever comes first: other candidates, or passes that no longer see the layer."""
    for names in (("one", "gone"), ("gone", "one")):
        job = Job(None, ("one=float",))
        for name in names:
            model = two_layers()
            model.nodes("MatMul")[0].name = name
            job.run(weights("one=float"), model)
        assert job.unmatched == []


def test_time_and_progress_go_by_stage() -> None:
    seen: list[tuple[str, int, int]] = []
    job = Job(lambda *told: seen.append(told))
    tell = job.sample_progress(8)
    assert tell is not None
    with job.stage("validate"):
        tell(3)
    for _ in range(2):
        job.run(drop_noops, two_layers())
    assert seen == [("validate", 3, 8)]
    assert set(job.seconds) == {"validate", "drop_noops"}
    assert Job(None).sample_progress(8) is None
