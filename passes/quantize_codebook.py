"""Store weights as indices into a codebook: few bits whose values lie where the weights do.

    y = Layer(x, W)    =>    y = Layer(x, Mul(Gather(codebook, Cast(indices)), s))

It is computed once, when the model is loaded: the file is small and the speed that of floats. How
the codebook is chosen: `onnxq.codebooks`; how it is written: `onnxq.passes.codebook_encoding`.

Layers can have a linear format instead (`onnxq.passes.encodings`): where an override asks for one;
where int8 takes no more bits than indices, scales and codebook together; and for what multiplies
the state of LSTM, GRU and RNN, whose errors add up from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from onnxq.codebooks import CodebookScheme, Kind
from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.layers import Layers
from onnxq.model import Model
from onnxq.options import require_range
from onnxq.parallel import Crew
from onnxq.passes.codebook_encoding import SINCE, Coded, IndexStorage, coded
from onnxq.passes.coding import CodeSource
from onnxq.passes.encodings import CAST_SINCE, Emitter, Packed, evened, opset_for, stored
from onnxq.passes.importance import Importance, observed
from onnxq.passes.layouts import Held
from onnxq.passes.streamed import Making, Source, each_made
from onnxq.passes.weight_storage import (
    Found,
    Unpacked,
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

NAME = "quantize_codebook"
LINEAR = "int8"  # where a codebook is not worth it, or not safe
BITS, VECTOR_BITS, VECTOR_DIM = 4, 8, 4  # where not given
WEIGHED = "importance"


@dataclass(frozen=True, slots=True)
class QuantizeCodebook:
    """Weights of at least `smallest` elements that are still floats, in bodies too.

    codebook: how its values are chosen (`onnxq.codebooks`). bits: of an index, 1 to 8; default 4,
    for vectors 8. granularity: one scale a tensor, channel or group of `group_size`. dim:
    neighbouring values that share an index, of vectors alone (default 4). range: importance weighs
    errors by the mean squares of what the weight is multiplied with, seen in samples. seed: of
    vectors. state: what multiplies the state of LSTM, GRU and RNN. layers: overrides for single
    layers, "PATTERN=FORMAT" with a linear format or float, the last match wins.
    """

    codebook: Kind = "kmeans"
    bits: int | None = None
    granularity: Literal["tensor", "channel", "group"] = "group"
    group_size: int = 64
    dim: int | None = None
    range: Literal["mse", "importance"] = "mse"
    seed: int = 0
    smallest: int = 512
    state: Literal["int8", "codebook"] = "int8"
    layers: tuple[str, ...] = ()
    target: Target | None = None
    samples: Samples | None = field(default=None, repr=False)
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)
    crew: Crew | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_range("seed", self.seed, 0)
        require_range("smallest", self.smallest, 1)
        require_formats(self._named(), self.target)
        self._scheme()

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    @staticmethod
    def wants(field: str, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, it has to be given `field`; see `onnxq.recipes.wants`."""
        return field != "samples" or options.get("range") == WEIGHED

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
        """Why the target can do nothing with what the pass writes; None: it can."""
        if self.target is None or self.target.stored_weights:
            return None
        return (
            f"{self.target.name} does not unpack codebooks at load: "
            "use a recipe that quantizes activations, too"
        )

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Store weights in few bits in place; a note for each, or why not.

        Raises DataError for range "importance" without samples, or with ones that do not fit.
        """
        return _Work(self, model).run()

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


@dataclass(frozen=True, slots=True)
class _Job:
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


class _Work:
    """One run of the pass over one model."""

    def __init__(self, options: QuantizeCodebook, model: Model) -> None:
        self.options, self.model = options, model
        self.notes: list[Note] = []
        self.unpacked = Unpacked(model)

    def run(self) -> list[Note]:
        jobs = self._jobs()
        importance: Importance = {}
        if self.options.range == WEIGHED and jobs:
            held = [(job.weight.node, job.weight.held) for job in jobs]
            importance = observed(self.model, held, self.options.samples, self.options.progress)
        sources: list[Making[Packed | Coded]] = [
            self._source(job, number, importance) for number, job in enumerate(jobs)
        ]
        keys = [(id(j.weight.tensor), j.weight.held.key, j.form) for j in jobs]
        crew, scratch = self.options.crew or Crew(), self.model.scratch
        with closing(each_made(crew, scratch, keys, sources)) as made:
            for job, result in zip(jobs, made, strict=True):
                try:
                    self._store(job, result.result(), importance)
                except Skip as reason:
                    self._declined(job.weight, str(reason))
        if any(note.changed for note in self.notes):
            self.model.sweep()
        return self.notes

    def _declined(self, weight: Found, why: str) -> None:
        self.notes.append(Note(NAME, weight.node.name, why, changed=False))

    def _jobs(self) -> list[_Job]:
        """What is to be stored, and how; decided before anything is edited."""
        options = self.options
        found, notes = find_weights(self.model, options.layers, options.smallest, rule=NAME)
        self.notes += notes
        jobs = []
        for weight in found:
            try:
                jobs.append(self._planned(weight))
            except Skip as reason:
                self._declined(weight, str(reason))
        return jobs

    def _planned(self, weight: Found) -> _Job:
        """Choose a codebook or a linear format; raises Skip when neither can be had."""
        options, model = self.options, self.model
        if options.unfit is not None:
            raise Skip(options.unfit)
        scheme = options.scheme(weight.held)
        storage = IndexStorage.of(scheme.bits, model.opset, stored_formats(options.target))
        asked = weight.choice.weights if weight.choice is not None else None
        if asked is not None:
            return self._linear(weight, asked, storage)
        is_state = weight.node.op in RECURRENT and weight.held.index == 2
        if is_state and options.state == LINEAR:
            return self._linear(weight, LINEAR, storage, " (it multiplies the state)")
        bits = _bits(weight.held, scheme, storage)
        if _is_dear(weight, scheme, bits, options.linear(weight, LINEAR)):
            return self._linear(weight, LINEAR, storage, f" (a codebook takes {bits:.1f} bits)")
        if not weight.is_worth(bits):
            raise Skip(f"{bits:.1f} bits a weight, codebook and scales included, save nothing")
        if model.opset < SINCE:
            raise Skip(f"opset {model.opset} cannot unpack codebooks: opset {SINCE} can")
        return _Job(weight, scheme, storage)

    def _linear(self, weight: Found, format: str, storage: IndexStorage, remark: str = "") -> _Job:
        scheme = self.options.linear(weight, format)
        bits = linear_bits(weight.held, scheme)
        if not weight.is_worth(bits):
            raise Skip(f"{bits:.1f} bits a weight, scales included, save nothing")
        if (old := why_too_old(self.model, scheme, "storage")) is not None:
            raise Skip(old)
        return _Job(weight, scheme, storage, remark)

    def _source(self, job: _Job, number: int, importance: Importance) -> Source | CodeSource:
        weight, scheme, held = job.weight, job.scheme, job.weight.held
        squares = importance.get((id(weight.node), held.index))
        if isinstance(scheme, CodebookScheme):
            seed = self.options.seed + number
            return CodeSource(weight.tensor, held, scheme, job.storage, seed, squares)
        method: Literal["mse", "importance"] = "mse" if squares is None else "importance"
        return Source(weight.tensor, held, scheme, method, squares=squares)

    def _store(self, job: _Job, made: Packed | Coded, importance: Importance) -> None:
        def write(on: Emitter) -> Any:
            return coded(on, made) if isinstance(made, Coded) else stored(on, made)

        weight = job.weight
        self.unpacked.use(weight, job.form, write)
        is_seen = (id(weight.node), weight.held.index) in importance
        unseen = self.options.range == WEIGHED and not is_seen
        text = f"{job.text}{', mse: its input was not observed' if unseen else ''}"
        self.notes.append(Note(NAME, weight.node.name, text))


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
