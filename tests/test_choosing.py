"""Which of several results is taken, and recipe auto on real models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

import onnxq
from onnxq.choosing import SLOWER, Candidate, Objective, choose, judged
from onnxq.errors import BudgetError, RecipeError
from onnxq.recipes import load_recipe

MODELS = Path(__file__).parent.parent / "models"
MODEL, DATA = MODELS / "digits_cnn.onnx", MODELS / "digits_cnn.calib.npz"


def row(time: float | None, size: int, sqnr: float = 30.0, verdict: str = "") -> Candidate:
    return Candidate("r", size, sqnr, time, verdict)


@pytest.mark.parametrize(
    ("rows", "objective", "best"),
    [
        ([row(0.9, 100), row(0.5, 200)], "speed", 1),
        ([row(0.9, 100), row(0.5, 200)], "size", 0),
        ([row(0.51, 100), row(0.5, 200)], "speed", 0),  # within noise: the smaller
        ([row(0.5, 1000, 30), row(0.5, 1001, 40)], "speed", 1),  # one size, too: the more exact
        ([row(0.5, 1000), row(0.7, 995)], "size", 0),  # one size: the faster
        ([row(0.5, 100, verdict="below 20 dB"), row(0.9, 200)], "speed", 1),
        ([row(None, 100), row(None, 50)], "speed", 0),  # not timed: the earlier
        ([row(None, 100), row(None, 50)], "size", 1),
        ([row(0.5, 100), row(0.5, 100)], "speed", 0),
        ([row(0.5, 100, verdict="x")], "speed", None),
        ([], "size", None),
    ],
)
def test_choose(rows: list[Candidate], objective: Objective, best: int | None) -> None:
    assert choose(rows, objective) == best


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        (row(0.5, 1, 19.9), "below 20 dB"),
        (row(1.04, 1), SLOWER),
        (row(1.02, 1), ""),
        (row(None, 1), ""),
        (Candidate("r"), ""),
        (row(2.0, 1, verdict="nothing was quantized"), "nothing was quantized"),
    ],
)
def test_judged(candidate: Candidate, verdict: str) -> None:
    assert judged(candidate, 20.0).verdict == verdict


@pytest.mark.parametrize("name", ["digits_cnn", "char_gpt", "lang_lstm"])
def test_auto_on_real_models(name: str, tmp_path: Path) -> None:
    """The result is within the budget, smaller, and the recipe it names gives the same bytes."""
    model, out, again = MODELS / f"{name}.onnx", tmp_path / "a.onnx", tmp_path / "b.onnx"
    data = MODELS / f"{name}.calib.npz"
    report = onnxq.optimize(model, out, data=data)
    assert report.recipe == "auto"
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db >= 20
    assert report.size_bytes[1] < 0.5 * report.size_bytes[0]
    assert report.latency is not None
    assert not report.is_slower
    (best,) = [c for c in report.candidates if c.verdict == "chosen"]
    assert best.recipe == report.plan.name
    assert [c.recipe for c in report.candidates] == [r.name for r in load_recipe("auto").choose]
    plan = tmp_path / "plan.toml"
    plan.write_text(report.plan.to_toml())
    onnxq.optimize(model, again, data=data, recipe=str(plan), validate=False)
    assert again.read_bytes() == out.read_bytes()


def test_a_budget_leaves_the_more_exact_ones(tmp_path: Path) -> None:
    tried = onnxq.optimize(MODEL, data=DATA).candidates
    reached = {c.recipe: c.sqnr_db for c in tried if c.sqnr_db is not None}
    worst = min(reached, key=reached.__getitem__)
    wanted = reached[worst] + 0.01
    report = onnxq.optimize(MODEL, data=DATA, min_sqnr=wanted)
    assert {c.recipe: c.verdict for c in report.candidates}[worst] == f"below {wanted:g} dB"
    assert report.fidelity is not None
    assert report.fidelity.sqnr_db >= wanted
    with pytest.raises(BudgetError, match=r"--min-sqnr is 90.*layers furthest off.*int8: below 90"):
        onnxq.optimize(MODEL, tmp_path / "out.onnx", data=DATA, min_sqnr=90)
    assert list(tmp_path.iterdir()) == []


def test_without_data_nothing_is_calibrated() -> None:
    report = onnxq.optimize(MODEL)
    verdicts = {c.recipe: c.verdict for c in report.candidates}
    assert verdicts["int8"] == "needs --data"
    assert verdicts[report.plan.name] == "chosen"
    assert not any("ranges come from synthetic" in warning for warning in report.warnings)


def test_elsewhere_the_order_decides() -> None:
    """The time of ONNX Runtime says nothing of an accelerator's."""
    report = onnxq.optimize(MODEL, data=DATA, target="tensorrt")
    assert report.plan.name == "int8"
    assert all(c.time_ratio is None for c in report.candidates)


def test_size_is_an_objective() -> None:
    report = onnxq.optimize(MODEL, data=DATA, objective="size")
    sizes = {c.recipe: c.size_bytes for c in report.candidates if c.size_bytes}
    assert sizes[report.plan.name] <= 1.01 * min(sizes.values())


def test_candidates_that_come_to_the_same_are_tried_once(tmp_path: Path) -> None:
    both = tmp_path / "both.toml"
    both.write_text('description = "twice"\nchoose = ["int8", "mine.toml"]')
    (tmp_path / "mine.toml").write_text(load_recipe("int8").to_toml())
    report = onnxq.optimize(MODEL, data=DATA, recipe=str(both))
    assert [c.verdict for c in report.candidates] == ["chosen", "the same as int8"]


def test_candidates_that_calibrate_different_models(tmp_path: Path) -> None:
    """16-bit activations need opset 21, where the mean's axes are an input: other statistics."""
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 13]>
        g (float[n, 8, 16, 16] x) => (float[n, 32] y) {
            c = Conv<pads = [1, 1, 1, 1]>(x, w)  r = Relu(c)  d = Conv<pads = [1, 1, 1, 1]>(r, v)
            p = ReduceMean<axes = [2, 3], keepdims = 0>(d)  y = Relu(p)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, channels in (("w", 8), ("v", 32)):
        values = rng.normal(0, 0.1, (32, channels, 3, 3)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    data = [{"x": rng.normal(0, 1, (1, 8, 16, 16)).astype(np.float32)} for _ in range(12)]
    both, file = tmp_path / "both.toml", tmp_path / "seen.npz"
    both.write_text('description = "8 or 16 bits"\nchoose = ["int8", "a16w8"]')
    for _ in range(2):  # the first candidate's statistics are written, then read
        report = onnxq.optimize(proto, data=lambda: iter(data), recipe=str(both), calibration=file)
        assert [c.sqnr_db is not None for c in report.candidates] == [True, True]
    onnxq.optimize(proto, data=lambda: iter(data), recipe="int8", calibration=file)


def test_candidates_may_have_one_name(tmp_path: Path) -> None:
    (tmp_path / "int8.toml").write_text(load_recipe("int8-weights").to_toml())
    both = tmp_path / "both.toml"
    both.write_text('description = "two"\nchoose = ["int8", "int8.toml"]')
    report = onnxq.optimize(MODEL, data=DATA, recipe=str(both), objective="size")
    first, second = report.candidates
    assert first.recipe == second.recipe == "int8"
    assert first.sqnr_db != second.sqnr_db


def test_a_candidate_that_stumbles_is_out_and_the_others_go_on(tmp_path: Path) -> None:
    def tried(names: str) -> onnxq.Report:
        both = tmp_path / "both.toml"
        both.write_text(f'description = "d"\nchoose = [{names}]')
        return onnxq.optimize(
            MODEL, data=DATA, recipe=str(both), target="openvino", layers=["first=a16"],
            objective="size",
        )  # fmt: skip

    report = tried('"int8", "int8-weights"')
    assert "executes no activations of 16 bits" in report.candidates[0].verdict
    assert report.plan.name == "int8-weights"
    with pytest.raises(RecipeError, match="executes no activations of 16 bits"):
        tried('"int8"')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('choose = ["int8", "nope"]', "'nope', which is not a recipe"),
        ("choose = []", "a list of recipes"),
        ('choose = ["int8"]\npasses = ["cleanup"]', "beside choose it has passes"),
        ('choose = ["self.toml"]', "itself a choice"),
        ('choose = ["auto"]', "itself a choice"),
    ],
)
def test_choices_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "self.toml"
    path.write_text(f'description = "d"\n{text}')
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path))


def test_auto_has_to_compare(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no --no-validate"):
        onnxq.optimize(MODEL, tmp_path / "out.onnx", validate=False)


def test_nothing_to_quantize_says_what_could_be_tried() -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1, 4] x) => (float[1, 4] y)'
        " { y = Relu(x) }"
    )
    with pytest.raises(BudgetError, match=r"nothing was quantized: .*with --data more"):
        onnxq.optimize(model)
    with pytest.raises(BudgetError, match="nothing was quantized") as error:
        onnxq.optimize(model, data=[{"x": np.zeros((1, 4), np.float32)}])
    assert "--data" not in str(error.value)


def test_the_original_is_not_touched() -> None:
    proto = onnx.load(MODEL)
    before = proto.SerializeToString(deterministic=True)
    onnxq.optimize(proto, data=DATA)
    assert proto.SerializeToString(deterministic=True) == before
