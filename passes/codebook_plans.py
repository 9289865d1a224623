"""Which weights become indices into codebooks, and which of them have a linear format instead.

What `quantize_codebook` does, decided before anything is edited; passes that choose its indices
beforehand are told the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np

from onnxq.codebooks import CodebookScheme, Kind
from onnxq.core import Note, Skip
from onnxq.layers import Layers
from onnxq.model import Model, values_of
from onnxq.options import require_range
from onnxq.passes.codebook_encoding import SINCE, IndexStorage
from onnxq.passes.encodings import CAST_SINCE, evened, opset_for
from onnxq.passes.layouts import Held
from onnxq.passes.weight_storage import (
    Found,
    find_weights,
    linear_bits,
    require_formats,
    shared_by,
    stored_formats,
    told,
    why_too_old,
)
from onnxq.passes.work import RECURRENT
from onnxq.schemes import (
    FORMATS,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantScheme,
)
from onnxq.targets import Target

LINEAR = "int8"  # where a codebook is not worth it, or not safe
BITS, VECTOR_BITS, VECTOR_DIM = 4, 8, 4  # where not given
PRUNED = 0.1  # share of zeros from which a weight counts as pruned


@dataclass(frozen=True, slots=True)
class CodebookJob:
    """How one weight is to be stored; remark: for the note."""

    weight: Found
    scheme: CodebookScheme | QuantScheme
    storage: IndexStorage
    remark: str = ""

    @property
    def form(self) -> str:
        """What tells apart ways to store one weight."""
        return repr(self.scheme)

    @property
    def text(self) -> str:
        """What it will be."""
        held, scheme = self.weight.held, self.scheme
        if isinstance(scheme, QuantScheme):
            return f"{told(held, scheme)}, storage{self.remark}"
        vectors = f" of {scheme.dim} values" if scheme.dim > 1 else ""
        each = _bits(held, scheme, self.storage)
        return (
            f"weights as {scheme.kind} codebook of {scheme.entries} entries{vectors} "
            f"{shared_by(scheme.granularity)}, {each:.1f} bits each, storage{self.remark}"
        )


@dataclass(frozen=True, slots=True)
class CodebookPlan:
    """The options of quantize_codebook that decide about formats, see there.

    Raises ValueError for formats that the target cannot run.
    """

    codebook: Kind
    bits: int | None
    granularity: Literal["tensor", "channel", "group"]
    group_size: int
    dim: int | None
    smallest: int
    state: Literal["int8", "codebook"]
    layers: tuple[str, ...]
    target: Target | None

    def __post_init__(self) -> None:
        require_range("smallest", self.smallest, 1)
        require_formats(self._named(), self.target)
        self._scheme()

    @property
    def opset(self) -> int:
        """The opset that a model should have: uint4 loads faster than two indices in a byte.

        2 bits share bytes in models below opset 25, which few runtimes read.
        """
        since = CAST_SINCE["uint4"]
        storage = IndexStorage.of(self._scheme().bits, since, stored_formats(self.target))
        fastest = since if storage.type else SINCE
        return max([SINCE, fastest, *(opset_for(f, "storage", groups=True) for f in self._named())])

    @property
    def unfit(self) -> str | None:
        """Why the target can do nothing with codebooks; None: it can."""
        if self.target is None or self.target.stored_weights:
            return None
        return (
            f"{self.target.name} does not unpack codebooks at load: "
            "use a recipe that quantizes activations, too"
        )

    def jobs(self, model: Model, rule: str) -> tuple[list[CodebookJob], list[Note]]:
        """What is to be stored, and how; and notes under `rule` for what is not."""
        found, notes = find_weights(model, self.layers, self.smallest, rule=rule)
        jobs = []
        for weight in found:
            try:
                jobs.append(self._planned(model, weight))
            except Skip as reason:
                notes.append(Note(rule, weight.node.name, str(reason), changed=False))
        return jobs, notes

    def _planned(self, model: Model, weight: Found) -> CodebookJob:
        """Choose a codebook or a linear format; raises Skip when neither can be had."""
        if self.unfit is not None:
            raise Skip(self.unfit)
        scheme = self.scheme(weight.held)
        storage = IndexStorage.of(scheme.bits, model.opset, stored_formats(self.target))
        asked = weight.choice.weights if weight.choice is not None else None
        if asked is not None:
            return self._linear(model, weight, asked, storage)
        if scheme.dim > 1 and _is_pruned(weight):
            remark = " (an index of several values does not keep the zeros of a pruned weight)"
            return self._linear(model, weight, LINEAR, storage, remark)
        is_state = weight.node.op in RECURRENT and weight.held.index == 2
        if is_state and self.state == LINEAR:
            return self._linear(model, weight, LINEAR, storage, " (it multiplies the state)")
        bits = _bits(weight.held, scheme, storage)
        if _is_dear(weight, scheme, bits, self.linear(weight, LINEAR)):
            remark = f" (a codebook takes {bits:.1f} bits)"
            return self._linear(model, weight, LINEAR, storage, remark)
        if not weight.is_worth(bits):
            raise Skip(f"{bits:.1f} bits a weight, codebook and scales included, save nothing")
        if model.opset < SINCE:
            raise Skip(f"opset {model.opset} cannot unpack codebooks: opset {SINCE} can")
        return CodebookJob(weight, scheme, storage)

    def _linear(
        self, model: Model, weight: Found, format: str, storage: IndexStorage, remark: str = ""
    ) -> CodebookJob:
        scheme = self.linear(weight, format)
        bits = linear_bits(weight.held, scheme)
        if not weight.is_worth(bits):
            raise Skip(f"{bits:.1f} bits a weight, scales included, save nothing")
        if (old := why_too_old(model, scheme, "storage")) is not None:
            raise Skip(old)
        return CodebookJob(weight, scheme, storage, remark)

    def _named(self) -> list[str]:
        """The linear formats that overrides name."""
        return sorted({c.weights for c in Layers.parse(self.layers).all if c.weights})

    def _scheme(self) -> CodebookScheme:
        is_vector = self.codebook == "vector"
        bits = self.bits if self.bits is not None else VECTOR_BITS if is_vector else BITS
        dim = self.dim if self.dim is not None else VECTOR_DIM if is_vector else 1
        return CodebookScheme(self.codebook, bits, self._shared(), dim)

    def _shared(self) -> Granularity:
        if self.granularity == "group":
            return PerGroup(self.group_size, 1)
        return PerTensor() if self.granularity == "tensor" else PerChannel(0)

    def scheme(self, held: Held) -> CodebookScheme:
        """How a weight is put into a codebook: groups longer than a channel are channels.

        Others are of even size: a short last one would be filled up.
        """
        scheme, size = self._scheme(), self.group_size
        if self.granularity != "group":
            return scheme
        if held.length <= size:
            return replace(scheme, granularity=PerChannel(0))
        groups = -(-held.length // size)
        even = -(-held.length // (groups * scheme.dim)) * scheme.dim
        return replace(scheme, granularity=PerGroup(even, 1))

    def linear(self, weight: Found, format: str) -> QuantScheme:
        """How a weight is quantized in a linear format."""
        numbers, shared = FORMATS[format], self._shared()
        if numbers.bits >= 8 and not isinstance(shared, PerTensor):
            shared = PerChannel(0)
        if isinstance(shared, PerGroup) and weight.held.length <= shared.size:
            shared = PerChannel(0)
        return evened(QuantScheme(format, shared), weight.held)


def _is_dear(weight: Found, scheme: CodebookScheme, bits: float, linear: QuantScheme) -> bool:
    """Whether int8 is the better choice: it takes no more, and its values lie closer.

    Those of 8-bit indices do not; there it is the codebook itself that may be too large.
    """
    if scheme.bits == 8 and scheme.dim == 1:
        return 32 * scheme.entries > weight.size  # a bit a weight
    return bits >= linear_bits(weight.held, linear)


def _bits(held: Held, scheme: CodebookScheme, storage: IndexStorage) -> float:
    """Bits a weight, with scales and the codebook, as they lie in the file."""
    values, grain = held.length, scheme.granularity
    whole = grain.size if isinstance(grain, PerGroup) else scheme.dim
    indices = -(-values // whole) * whole / scheme.dim  # the last ones filled up
    needed = -(-values // scheme.dim)
    bits = scheme.bits_per_weight((prod(held.shape) // values, values))
    return bits + (indices * storage.each - needed * scheme.bits) / values


def _is_pruned(weight: Found) -> bool:
    values = np.asarray(values_of(weight.tensor))
    return bool(np.count_nonzero(values) < (1 - PRUNED) * values.size)
