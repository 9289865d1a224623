"""Load, look at, clean up and save a model of several gigabytes; seconds and memory as JSON.

    python tests/bench/bench_large_model.py [gigabytes]

The model is a chain of layers with external data: MatMul, and behind every second one a Mul by
constants that clean-up folds into the weight; an Identity, and the last weight is the first one
again. It is made in a temporary folder, which is deleted afterwards. `command_*` is `onnxq optimize
large.onnx clean.onnx --recipe cleanup` as a process of its own.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from onnx import GraphProto, TensorProto, helper

from onnxq.model import Model, values_of

SIDE = 4096
BYTES = SIDE * SIDE * 4
DATA = "large.data"


def make(folder: Path, gigabytes: float) -> Path:
    """Write the model; each layer has a 64 MiB weight, the last two have the same one."""
    count = round(gigabytes * 1e9 / BYTES)
    info = [helper.make_tensor_value_info(n, 1, ["N", SIDE]) for n in ("t0", "y")]
    graph = helper.make_graph([], "large", info[:1], info[1:])
    with open(folder / DATA, "wb") as data:
        for i in range(count):
            seed = 0 if i == count - 1 else i
            data.write(np.random.default_rng(seed).random((SIDE, SIDE), np.float32).data)
            _weight(graph, f"w{i}", i)
            graph.node.append(helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"m{i}"]))
            op, *more = ("Mul", "scale") if i % 2 else ("Relu",)
            graph.node.append(helper.make_node(op, [f"m{i}", *more], [f"t{i + 1}"]))
    scale = np.linspace(0.5, 2, SIDE, dtype=np.float32)
    graph.initializer.append(helper.make_tensor("scale", 1, [SIDE], scale.tobytes(), raw=True))
    graph.node.append(helper.make_node("Identity", [f"t{count}"], ["z"]))
    graph.node.append(helper.make_node("Relu", ["z"], ["y"]))
    path = folder / "large.onnx"
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, ir_version=8, opset_imports=[opset])
    path.write_bytes(model.SerializeToString())
    return path


def _weight(graph: GraphProto, name: str, place: int) -> None:
    weight = graph.initializer.add(name=name, dims=[SIDE, SIDE], data_type=1)
    weight.data_location = TensorProto.EXTERNAL
    entries = {"location": DATA, "offset": str(place * BYTES), "length": str(BYTES)}
    for key, value in entries.items():
        weight.external_data.add(key=key, value=value)


def memory_mb(key: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process, in MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1000


def command(path: Path) -> dict[str, float]:
    """Clean-up by the command: seconds, and the most resident memory, mapped files included."""
    args = ["optimize", path, path.with_name("clean.onnx"), "--recipe", "cleanup", "--quiet"]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "onnxq", *map(str, args)], check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    size = sum(path.with_name(f"clean.onnx{end}").stat().st_size for end in ("", ".data"))
    nodes = len(Model.load(path.with_name("clean.onnx")).nodes())
    return {
        "command_seconds": seconds,
        "command_peak_mb": peak / 1000,
        "command_result_gb": size / 1e9,
        "command_nodes": nodes,
    }


def main() -> None:
    """Run the benchmark."""
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
    result: dict[str, float] = {"model_gb": gigabytes}
    with tempfile.TemporaryDirectory() as name:
        path = make(Path(name), gigabytes)
        result["nodes"] = len(Model.load(path).nodes())
        result |= command(path)
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
