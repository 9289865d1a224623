"""What zeros in one weight cost at the model's outputs: one session, the weights fed to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper

from onnxq import runtime
from onnxq.core import Skip
from onnxq.data import Feed, Samples
from onnxq.errors import RefusedError
from onnxq.model import Model, values_of
from onnxq.passes.range_simulation import Outputs, errors, run
from onnxq.sampling import divided

Curve = tuple[tuple[float, float], ...]
"""Points (share of zeros, dB of the outputs), ascending."""

SAMPLES = 16  # that are run, at most
LIMIT_DB = 120.0  # without an error
LARGEST = 1 << 30  # bytes of weights that a session is fed


def amounts_tried(amount: float) -> tuple[float, ...]:
    """At which amounts layers are tried, where all together have an amount."""
    rest = 1 - amount
    return (amount / 2, amount, amount + 0.4 * rest, amount + 0.7 * rest)


@dataclass(frozen=True, slots=True)
class Trial:
    """A session; the weights that it is fed, by name; samples, and what the model makes of them."""

    session: Any
    fed: Mapping[str, NDArray[Any]]
    samples: Sequence[Feed]
    reference: Sequence[Outputs]

    @classmethod
    def of(cls, model: Model, tensors: Sequence[gs.Tensor], samples: Samples) -> Trial:
        """On some of the samples that judge. Raises Skip for a model that is too large for it."""
        if sum(model.weight_sizes()) > LARGEST:
            raise Skip("over 1 GB of weights, too many to try: each has the same amount")
        proto = model.to_proto()
        wanted = {t.name: t for t in tensors}
        stored = {t.name: t for t in proto.graph.initializer if t.name in wanted}
        listed = {i.name for i in proto.graph.input}
        kept = [t for t in proto.graph.initializer if t.name not in stored]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
        proto.graph.input.extend(
            helper.make_tensor_value_info(name, t.data_type, t.dims)
            for name, t in stored.items()
            if name not in listed
        )
        fed = {name: np.asarray(values_of(wanted[name])) for name in stored}
        part = divided(samples)[1]
        some = list(islice(part, 0, None, max(1, -(-len(part) // SAMPLES))))
        try:
            session = runtime.session(proto)
        except RefusedError as e:
            raise Skip(f"weights cannot be tried: {e}") from e
        return cls(session, fed, some, [run(session, {**feed, **fed}) for feed in some])

    def db(self, name: str, values: NDArray[Any]) -> float:
        """How far outputs are from what they were, with other values of one weight."""
        made = [run(self.session, {**feed, **self.fed, name: values}) for feed in self.samples]
        found = errors(self.reference, made)
        error = float(found.mean()) if found.size else 0.0
        return float(np.clip(-10 * np.log10(max(error, 1e-30)), -LIMIT_DB, LIMIT_DB))
