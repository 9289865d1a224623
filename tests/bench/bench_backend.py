"""All models of the ONNX backend suite through clean-up and through the default recipe.

    python tests/bench/bench_backend.py [--only cleanup|int8]

About 2,000 models, several minutes. Prints how many came out right, and each that did not.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from backend_cases import Case, converted_cases, light_cases, node_cases, quantized, verdict

FINE = ("same", "not run", "quantized", "unchanged", "no samples")


def judged(judge: Callable[[Case], str], case: Case) -> str:
    """The verdict; a crash is one too."""
    try:
        return judge(case)
    except Exception as e:
        place = traceback.extract_tb(e.__traceback__)[-1]
        return f"CRASH {type(e).__name__} at {Path(place.filename).name}:{place.lineno}: {e!s:.120}"


def main() -> int:
    """Run and print; the number of models that came out wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=("cleanup", "int8"))
    options = parser.parse_args()
    wrong = 0
    for name, judge in (("cleanup", verdict), ("int8", quantized)):
        if options.only not in (None, name):
            continue
        start, counts = time.perf_counter(), Counter[str]()
        for case in chain(node_cases(), converted_cases(), light_cases()):
            text = judged(judge, case)
            kind = text.split(":")[0] if text not in FINE else text
            declined = kind.endswith("Error") and not kind.startswith("CRASH")
            counts[kind if text in FINE or declined else "wrong"] += 1
            if text not in FINE and not declined:
                wrong += 1
                print(f"{name} {case.name}: {text}", flush=True)
            elif declined:
                counts[text[:100]] += 1
        print(f"{name}: {dict(counts.most_common())}, {time.perf_counter() - start:.0f} s")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
