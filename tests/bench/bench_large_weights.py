"""Weights of a model of gigabytes in few bits, from load to saved file; time and memory as JSON.

    python tests/bench/bench_large_weights.py [gigabytes] [rounds] [folder]

The model is a stack of MatMuls of 4096 x 4096, float32, with external data; it is made in a
temporary folder (beside it the results), which is deleted afterwards. Each thing is a process of
its own, in turn, the best of the rounds counts: int4 in groups of 32 by `onnxq optimize`
and by the Python API, by ONNX Runtime's MatMulNBitsQuantizer (which needs `pip install onnx-ir`;
left out without), HQQ, and other formats; RUNS=int4,int8 takes only these. seconds: the whole
process; work: without imports, where what runs says so; cpu: user and system time of all threads.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_large_model import BYTES, DATA, SIDE, _weight
from onnx import helper

COMMAND = [sys.executable, "-m", "onnxq", "optimize", "IN", "OUT", "--no-validate", "--quiet"]
INT4 = [*COMMAND, "--recipe", "int4-weights", "--layer", "*=int4", "--weights", "int4"]
WHOLE = [*COMMAND, "--recipe", "int8-weights", "--layer", "*=int8", "--encoding", "compute"]
PEER = """
import sys, time, onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
start = time.perf_counter()
quantizer = MatMulNBitsQuantizer(onnx.load("IN"), block_size=32, is_symmetric=True)
quantizer.process()
quantizer.model.save_model_to_file("OUT", True)
print("work", time.perf_counter() - start)
"""
PYTHON = """
import time, onnxq
from onnxq.parallel import Crew
from onnxq.passes.quantize_weights import QuantizeWeights
start = time.perf_counter()
model = onnxq.Model.load("IN")
QuantizeWeights("int4", "group", 32, crew=Crew.of())(model)
model.save("OUT")
print("work", time.perf_counter() - start)
"""
RUNS: dict[str, list[str]] = {
    "onnxruntime": [sys.executable, "-c", PEER],
    "python": [sys.executable, "-c", PYTHON],
    "int4": [*INT4, "--symmetric", "--range", "minmax"],
    "uint4": [*COMMAND, "--recipe", "int4-weights", "--layer", "*=uint4", "--range", "minmax"],
    "int2": [*INT4, "--symmetric", "--range", "minmax", "--weights", "int2", "--layer", "*=int2"],
    "int8": [*WHOLE, "--range", "minmax"],
    "int4_hqq": [*INT4, "--symmetric", "--range", "hqq"],
    "uint4_hqq": [*COMMAND, "--recipe", "int4-weights", "--layer", "*=uint4"],
    "kmeans": [*COMMAND, "--recipe", "codebook-weights"],
    "float16": [*COMMAND, "--recipe", "float16"],
    "dynamic": [*COMMAND, "--recipe", "int8-dynamic"],
    "cleanup": [*COMMAND, "--recipe", "cleanup"],
}


def make(folder: Path, gigabytes: float) -> Path:
    """Write the model."""
    count = round(gigabytes * 1e9 / BYTES)
    info = [helper.make_tensor_value_info(n, 1, ["N", SIDE]) for n in ("t0", f"t{count}")]
    graph = helper.make_graph([], "large", info[:1], info[1:])
    with open(folder / DATA, "wb") as data:
        for i in range(count):
            w = np.random.default_rng(i).standard_normal((SIDE, SIDE), np.float32)
            data.write((w * np.float32(0.02)).data)
            _weight(graph, f"w{i}", i)
            graph.node.append(helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"t{i + 1}"]))
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 25)])
    path = folder / "large.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def run(command: list[str], path: Path) -> dict[str, float] | None:
    """Seconds, the most resident memory, and the result's size; None where it does not run."""
    out = path.with_name("out.onnx")
    start = time.perf_counter()
    filled = [part.replace("IN", str(path)).replace("OUT", str(out)) for part in command]
    with subprocess.Popen(filled, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read().split()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        return None
    size = sum(file.stat().st_size for file in path.parent.glob("out.onnx*"))
    for file in path.parent.glob("out.onnx*"):
        file.unlink()
    return {
        "seconds": seconds,
        "work": float(said[1]) if said[:1] == ["work"] else seconds,
        "cpu": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss * 1024 / 1e6,
        "result_mb": size / 1e6,
    }


def main() -> None:
    """Run the benchmark; "make FOLDER GIGABYTES" is how it calls itself for the model.

    (A process starts with the peak of the one that starts it: this one has to stay small.)
    """
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]), float(sys.argv[3]))
        return
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.6
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    chosen = os.environ.get("RUNS", "").split(",") if os.environ.get("RUNS") else list(RUNS)
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=sys.argv[3] if len(sys.argv) > 3 else None) as name:
        subprocess.run([sys.executable, __file__, "make", name, str(gigabytes)], check=True)
        path = Path(name) / "large.onnx"
        for _ in range(rounds):
            for what in chosen:
                found = run(RUNS[what], path)
                if found is None:
                    continue
                held = best.setdefault(what, found)
                for key, value in found.items():
                    held[key] = max(held[key], value) if key == "peak_mb" else min(held[key], value)
        total = sum(p.stat().st_size for p in Path(name).glob("large*"))
    for found in best.values():
        found["mb_per_second"] = total / 1e6 / found["work"]
        for peer in {"onnxruntime", "int4"} & set(best):
            for key in ("work", "cpu"):
                found[f"{key}_of_{peer}"] = found[key] / best[peer][key]
    rounded = {what: {k: round(v, 3) for k, v in found.items()} for what, found in best.items()}
    print(json.dumps({"model_gb": gigabytes, **rounded}, indent=1))


if __name__ == "__main__":
    main()
