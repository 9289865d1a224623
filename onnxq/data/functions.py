"""Samples from a Python function, in memory or by its name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from onnxq.data.columns import joined
from onnxq.data.fitting import fitted_feed, inputs_of
from onnxq.data.samples import LABELS, Feed, Samples
from onnxq.errors import DataError
from onnxq.model import Model


def from_function(function: Callable[[], Any], text: str, model: Model) -> Samples:
    """Samples that a function yields; it is called anew for each time through them."""
    inputs = inputs_of(model)

    def feeds() -> Iterator[Feed]:
        try:
            yield from function()
        except DataError:
            raise
        except Exception as e:  # whatever the user's function raises
            raise DataError(f"{text}: {type(e).__name__}: {e}") from e

    labels, size = [], 0
    for feed in feeds():
        if not isinstance(feed, Mapping):
            raise DataError(
                f"{text}: yields {type(feed).__name__}, not a dict of arrays by input name"
            )
        size += 1
        if LABELS in feed:
            labels.append(np.asarray(feed[LABELS]))
    if not size:
        raise DataError(f"{text}: yields no samples")

    def read(start: int, stop: int) -> Iterator[Feed]:
        for i, feed in enumerate(islice(feeds(), start, stop), start):
            yield fitted_feed(feed, inputs, i)

    return Samples(read, size, text, joined(labels, size))


def imported(module: str, name: str) -> Callable[[], Any]:
    """The function of that name in a module that can be imported from here."""
    sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as e:  # whatever the user's module raises
        raise DataError(f"{module}:{name}: {type(e).__name__}: {e}") from e
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise DataError(f"{module}:{name} is not a function that yields feeds")
    return found  # type: ignore[no-any-return]
