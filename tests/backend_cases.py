"""The ONNX backend suite, as onnx ships it: node models, converted ones, and real architectures."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.reference import ReferenceEvaluator

from onnxq import runtime, workflow
from onnxq.errors import OnnxqError
from onnxq.model import Model
from onnxq.passes import cleanup

DATA = Path(onnx.__file__).parent / "backend/test/data"
FOLDERS = ("simple", "pytorch-converted", "pytorch-operator")
NEWEST_IR = 11  # that onnxruntime 1.31 takes; the suite's newest models differ in nothing else
# By operator: outputs that differ from run to run.
RANDOM = re.compile("Random|Bernoulli|Multinomial|Dropout")


@dataclass(frozen=True, slots=True)
class Case:
    """A model with one sample; an empty one where the suite's inputs are no tensors."""

    name: str
    model: onnx.ModelProto
    feed: dict[str, Any]


def node_cases() -> Iterator[Case]:
    """About 1,900 models of one or a few nodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    for case in found:
        sample = case.data_sets[0][0] if case.data_sets else []
        assert case.model is not None
        yield Case(case.name, case.model, _feed(case.model, list(sample)))


def converted_cases() -> Iterator[Case]:
    """Models in folders, with one .pb a tensor."""
    for folder in FOLDERS:
        for path in sorted((DATA / folder).glob("*/model.onnx")):
            files = sorted(
                (path.parent / "test_data_set_0").glob("input_*.pb"),
                key=lambda p: int(p.stem.split("_")[1]),
            )
            model = onnx.load(path)
            yield Case(path.parent.name, model, _feed(model, [_tensor(f) for f in files]))


def light_cases() -> Iterator[Case]:
    """Real architectures (ResNet-50, DenseNet ...) whose weights are made by ConstantOfShape."""
    for path in sorted((DATA / "light").glob("*.onnx")):
        model = onnx.load(path)
        rng = np.random.default_rng(0)
        weights = {t.name for t in model.graph.initializer}
        inputs = [i for i in model.graph.input if i.name not in weights]
        shapes = [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in inputs]
        sample = [rng.normal(0, 1, shape).astype(np.float32) for shape in shapes]
        yield Case(path.stem, model, dict(zip((i.name for i in inputs), sample, strict=True)))


def _feed(model: onnx.ModelProto, sample: list[Any]) -> dict[str, Any]:
    weights = {t.name for t in model.graph.initializer}
    names = [i.name for i in model.graph.input if i.name not in weights]
    names = names if len(names) == len(sample) else [i.name for i in model.graph.input]
    return dict(zip(names, map(_plain, sample), strict=False))


def _plain(value: Any) -> Any:
    """Tensors as arrays; sequences stay lists."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _tensor(path: Path) -> Any:
    proto = onnx.TensorProto()
    proto.ParseFromString(path.read_bytes())
    return numpy_helper.to_array(proto)


def outputs(model: onnx.ModelProto, feed: dict[str, Any]) -> list[Any] | None:
    """What onnxruntime computes, optimizations off; None where it cannot run the model."""
    older = onnx.ModelProto()
    older.CopyFrom(model)
    older.ir_version = min(model.ir_version, NEWEST_IR)
    try:
        return list(runtime.run(runtime.session(older, optimize="off"), feed).values())
    except Exception:  # onnxruntime's exceptions share no base but Exception
        return None


def reference_outputs(model: onnx.ModelProto, feed: dict[str, Any]) -> list[Any] | None:
    """What onnx's own evaluator computes; None where it cannot run the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return list(ReferenceEvaluator(model).run(None, feed))
        except Exception:  # it raises whatever numpy does
            return None


def cleaned(case: Case) -> onnx.ModelProto:
    """Load, clean-up, save, load."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        onnx.save(case.model, source)
        model = Model.load(source)
        cleanup(model)
        model.save(target)
        return onnx.load(target)


def verdict(case: Case) -> str:
    """What clean-up did: see `judged`."""
    return judged(case, cleaned(case))


def judged(case: Case, result: onnx.ModelProto) -> str:
    """`same`, `not run` (nothing here can run the original), or what is wrong with the result."""
    for kind in ("input", "output"):
        before, after = (
            [v.SerializeToString() for v in getattr(p.graph, kind) if v.name not in _weights(p)]
            for p in (case.model, result)
        )
        if before != after:
            return f"the {kind}s differ"
    if any(RANDOM.search(node.op_type) for node in case.model.graph.node):
        return "same"
    for engine in (outputs, reference_outputs):
        reference = engine(case.model, case.feed)
        if reference is not None:
            break
    else:
        return "not run"
    made = engine(result, case.feed)
    if made is None:
        return "the result does not run"
    for a, b in zip(reference, made, strict=True):
        if not _equal(a, b):
            return f"outputs differ: {a!s:.60} and {b!s:.60}"
    return "same"


def _weights(proto: onnx.ModelProto) -> set[str]:
    return {t.name for t in proto.graph.initializer}


def _equal(a: Any, b: Any) -> bool:
    """Equal within float rounding; sequences element by element."""
    if isinstance(a, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray) and a.dtype.kind == "V" and a.dtype == b.dtype:
        a, b = a.astype(np.float32), b.astype(np.float32)  # float8, bfloat16 ...
    if not isinstance(a, np.ndarray) or a.dtype.kind not in "fc":
        same = a is None or (np.shape(a) == np.shape(b) and np.array_equal(a, b))
        return bool(same)
    rough = 1e-2 if a.dtype.itemsize == 2 else 1e-4
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and np.allclose(a, b, rtol=rough, atol=rough, equal_nan=True)
    )


def quantized(case: Case) -> str:
    """What the default recipe does: `quantized`, `unchanged`, or the reason it gives.

    Raises AssertionError for a result that does not load, and whatever is no OnnxqError.
    """
    if not case.feed or not all(isinstance(v, np.ndarray) for v in case.feed.values()):
        return "no samples"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.onnx"
        try:
            report = workflow.optimize(
                case.model,
                target,
                data=[case.feed],
                recipe="int8",
                allow_unchanged=True,
                validate=False,
            )
        except OnnxqError as e:
            return f"{type(e).__name__}: {e}"
        changed = any(n.changed and n.rule.startswith("quantize") for n in report.notes)
        if changed and outputs(case.model, case.feed) is not None:
            assert outputs(onnx.load(target), case.feed) is not None, case.name
        return "quantized" if changed else "unchanged"
