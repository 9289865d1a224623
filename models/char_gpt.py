"""Train char_gpt: a causal character transformer on the standard library's documentation.

The text is what `inspect.getdoc` gives for the modules and functions of the standard library of the
Python that runs this script (PSF licence).
"""

from __future__ import annotations

import importlib
import inspect
import math

import numpy as np
import torch
from common import export, save_samples, train
from torch import Tensor, nn

LENGTH, WIDTH, HEADS, LAYERS = 64, 96, 4, 3
MODULES = (
    "argparse ast asyncio base64 bisect calendar collections concurrent.futures configparser "
    "contextlib copy csv datetime decimal difflib dis email enum fractions functools gettext "
    "glob heapq html inspect io itertools json locale logging math multiprocessing numbers "
    "operator os pathlib pickle platform queue random re sched shelve shlex shutil socket "
    "sqlite3 ssl statistics string struct subprocess symtable sys tempfile textwrap threading "
    "time tokenize traceback types typing unittest urllib.parse urllib.request uuid warnings "
    "weakref xml.dom xml.etree.ElementTree zipfile "
).split()


def text() -> str:
    """The documentation of MODULES, each piece once, printable ASCII."""
    pieces: dict[str, None] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        members = [m for _, m in sorted(inspect.getmembers(module), key=lambda pair: pair[0])]
        for thing in (module, *members):
            home = getattr(thing, "__module__", None) or name
            if home.split(".")[0] == name.split(".")[0]:
                pieces[inspect.getdoc(thing) or ""] = None
                if inspect.isclass(thing):
                    pieces |= {inspect.getdoc(m) or "": None for m in vars(thing).values()}
    return "".join(c for c in "\n\n".join(pieces) if c == "\n" or 32 <= ord(c) < 127)


class Block(nn.Module):
    """Attention and a multi-layer perceptron, normalised before each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[N, T, WIDTH] to the same; mask [T, T] is added to the scores."""
        n, t, _ = x.shape
        q, k, v = (
            part.reshape(n, t, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(WIDTH, -1)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS) + mask
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, WIDTH))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Tokens [N, T] to logits [N, T, characters]."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(characters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), -1e9).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each next character."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, self.mask[: tokens.shape[1], : tokens.shape[1]])
        return self.head(self.norm(x))


def main() -> None:
    """Train, write the model and its samples."""
    torch.manual_seed(0)
    written = text()
    alphabet = sorted(set(written))
    ids = torch.tensor([alphabet.index(c) for c in written])
    cut = int(0.9 * len(ids))
    print(f"{len(ids)} characters, {len(alphabet)} different")
    starts = torch.randint(0, cut - LENGTH - 1, (24000,))
    windows = torch.stack([ids[s : s + LENGTH + 1] for s in starts])
    model = Gpt(len(alphabet))
    train(model, windows[:, :-1], windows[:, 1:], epochs=2, batch=32, rate=3e-3)
    export(
        "char_gpt", model, windows[:1, :-1], opset=17, input_names=["tokens"],
        dynamic_axes={"tokens": {0: "N"}, "logits": {0: "N"}},
    )  # fmt: skip
    begin = np.linspace(cut, len(ids) - LENGTH - 2, 360).astype(int)
    held = torch.stack([ids[s : s + LENGTH + 1] for s in begin])
    for split, part in (("calib", held[::3][:120]), ("eval", held[1::3])):
        save_samples("char_gpt", split, tokens=part[:, :-1], labels=part[:, 1:])


if __name__ == "__main__":
    main()
