"""Train lang_lstm: which language a name is in, from its characters, with an LSTM.

The words are the names of territories, languages and currencies in Unicode CLDR as the PyPI package
Babel brings them along (Unicode licence).
"""

from __future__ import annotations

import numpy as np
import torch
from babel import Locale
from common import export, save_samples, train
from torch import Tensor, nn

LANGUAGES = ["de", "es", "fi", "hu", "nl", "pl", "tr", "vi"]
LENGTH, WIDTH = 20, 96


def names() -> tuple[Tensor, Tensor, int]:
    """Character ids [N, LENGTH] padded with 0, languages [N], and the number of different ids."""
    words: dict[str, set[int]] = {}
    for label, code in enumerate(LANGUAGES):
        locale = Locale.parse(code)
        for table in (locale.territories, locale.languages, locale.currencies):
            for name in table.values():
                words.setdefault(name.lower()[:LENGTH], set()).add(label)
    known = sorted((word, min(of)) for word, of in words.items() if len(of) == 1 and len(word) > 3)
    alphabet = sorted({c for word, _ in known for c in word})
    ids = np.zeros((len(known), LENGTH), np.int64)
    for row, (word, _) in enumerate(known):
        ids[row, : len(word)] = [alphabet.index(c) + 1 for c in word]
    order = np.random.default_rng(0).permutation(len(known))
    labels = np.array([label for _, label in known])
    return torch.tensor(ids[order]), torch.tensor(labels[order]), len(alphabet) + 1


class Lstm(nn.Module):
    """Characters [N, LENGTH] to scores [N, languages]."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, 32)
        self.lstm = nn.LSTM(32, WIDTH, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, len(LANGUAGES))

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of each language, from the mean of all states."""
        return self.head(self.lstm(self.embed(ids))[0].mean(1))


def main() -> None:
    """Train, write the model and its samples."""
    torch.manual_seed(0)
    x, y, characters = names()
    print(f"{len(x)} names, {characters} different characters")
    model = Lstm(characters)
    train(model, x[:-1000], y[:-1000], epochs=12, rate=4e-3)
    export(
        "lang_lstm", model, x[:1], opset=14, input_names=["characters"],
        dynamic_axes={"characters": {0: "N"}, "logits": {0: "N"}},
    )  # fmt: skip
    save_samples("lang_lstm", "calib", characters=x[-1000:-840], labels=y[-1000:-840])
    save_samples("lang_lstm", "eval", characters=x[-800:], labels=y[-800:])


if __name__ == "__main__":
    main()
