"""Load, look at, and save a model of several gigabytes; print seconds and memory as JSON.

    python tests/bench/bench_large_model.py [gigabytes]

The model (MatMuls with external data) is made in a temporary folder, which is deleted afterwards.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from onnxq.model import Model, values_of

SIDE = 4096
BYTES = SIDE * SIDE * 4


def make(folder: Path, gigabytes: float) -> Path:
    """A chain of MatMuls, each with a 64 MiB weight."""
    count = round(gigabytes * 1e9 / BYTES)
    rng = np.random.default_rng(0)
    info = [helper.make_tensor_value_info(n, 1, ["N", SIDE]) for n in ("t0", f"t{count}")]
    graph = helper.make_graph([], "large", info[:1], info[1:])
    with open(folder / "large.data", "wb") as data:
        for i in range(count):
            data.write(rng.random((SIDE, SIDE), np.float32).data)
            weight = graph.initializer.add(name=f"w{i}", dims=[SIDE, SIDE], data_type=1)
            weight.data_location = TensorProto.EXTERNAL
            place = {"location": "large.data", "offset": str(i * BYTES), "length": str(BYTES)}
            for key, value in place.items():
                weight.external_data.add(key=key, value=value)
            graph.node.append(helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"t{i + 1}"]))
    path = folder / "large.onnx"
    path.write_bytes(helper.make_model(graph, ir_version=8).SerializeToString())
    return path


def memory_mb(key: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process, in MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1000


def main() -> None:
    """Run the benchmark."""
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 2.5
    result: dict[str, float] = {"model_gb": gigabytes}
    with tempfile.TemporaryDirectory() as name:
        path = make(Path(name), gigabytes)
        Path("/proc/self/clear_refs").write_text("5")  # the most so far: from here
        result["before_mb"] = memory_mb("VmRSS")
        start = time.perf_counter()
        model = Model.load(path)
        result["load_seconds"] = time.perf_counter() - start
        result["loaded_rss_mb"] = memory_mb("VmRSS")
        start = time.perf_counter()
        for node in model.nodes("MatMul"):
            values = values_of(node.inputs[1])
            assert values is not None
            values.max()
        result["look_at_all_seconds"] = time.perf_counter() - start
        result["looked_peak_mb"] = memory_mb("VmHWM")
        result["looked_rss_mb"] = memory_mb("VmRSS")
        start = time.perf_counter()
        model.save(path.with_name("out.onnx"))
        result["save_seconds"] = time.perf_counter() - start
        result["peak_mb"] = memory_mb("VmHWM")
        start = time.perf_counter()
        Model.load(path.with_name("out.onnx")).save(path.with_name("out.onnx"))
        result["in_place_seconds"] = time.perf_counter() - start
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()
