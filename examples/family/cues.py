"""Cues: one image pooled without a query, by what stands out, and by what is looked for.

Without a query every patch counts the same. By salience alone (a non-volitional cue) what differs from the
rest draws the eye, whatever one wants. By a query (a volitional cue) one finds what one looks for.

python examples/family/cues.py [folder for cues.png]
"""

import sys
from pathlib import Path

import torch
from matplotlib import pyplot
from sklearn.datasets import load_sample_image
from torch import Tensor

from fastattn.nn import Attention

PATCH = 16  # pixels

# The same values and keys; only what makes the scores differs.
CUES = {
    "none, the mean": Attention(lambda queries, keys: queries.new_zeros(1, queries.shape[1], keys.shape[1])),
    "salience of the keys": Attention(lambda queries, keys: salience(keys).expand(-1, queries.shape[-2], -1)),
    "the query": Attention("cosine", temperature=0.05),
}


def salience(keys: Tensor) -> Tensor:
    """How far each key [1, N, D] is from their mean: [1, 1, N]."""
    return (keys - keys.mean(1, keepdim=True)).norm(dim=-1).unsqueeze(1)


def load_patches() -> tuple[Tensor, Tensor]:
    """The image [H, W, 3], from 0 to 1, and keys [h, w, 6]: mean and spread of each colour in each patch."""
    image = torch.tensor(load_sample_image("china.jpg")).float() / 255
    image = image[: image.shape[0] // PATCH * PATCH, : image.shape[1] // PATCH * PATCH]
    patches = image.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).flatten(3)  # [h, w, 3, pixels]
    keys = torch.cat([patches.mean(-1), patches.std(-1)], -1)
    return image, (keys - keys.mean((0, 1))) / keys.std((0, 1))


def look(keys: Tensor, query: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By each cue: the pooled value [D] and the weights [h, w]."""
    flat = keys.flatten(0, 1)[None]
    found = {}
    for name, attention in CUES.items():
        pooled = attention(query.view(1, 1, -1), flat, flat)
        found[name] = pooled[0, 0], attention.attention_weights.view(keys.shape[:2])
    return found


def main(folder: str = ".") -> None:
    image, keys = load_patches()
    places = {"the sky": (2, 4), "the roof": (9, 9), "the trees": (18, 36)}
    looks = {place: look(keys, keys[at]) for place, at in places.items()}

    print(f"{keys.shape[0] * keys.shape[1]} patches; how much of the weight moves when the query changes")
    for cue in CUES:
        weights = [looks[place][cue][1] for place in places]
        moved = max((a - b).abs().sum().item() / 2 for a in weights for b in weights)
        print(f"  {cue:<22}{moved:7.1%}")

    figure, grid = pyplot.subplots(len(places), 4, figsize=(11, 5.8), layout="constrained")
    for row, (place, (i, j)) in zip(grid, places.items(), strict=True):
        row[0].imshow(image)
        row[0].set_title(f"looking for {place}", fontsize=9)
        box = pyplot.Rectangle((j * PATCH, i * PATCH), PATCH, PATCH, fill=False, color="red", linewidth=2)
        row[0].add_patch(box)
        for axes, (cue, (_, weights)) in zip(row[1:], looks[place].items(), strict=True):
            axes.imshow(image.mean(-1), cmap="gray", alpha=0.35)
            extent = (0, image.shape[1], image.shape[0], 0)
            top = max(weights.max().item(), 4 / weights.numel())  # equal weights are then pale
            axes.imshow(weights, cmap="Reds", alpha=0.8, extent=extent, vmin=0, vmax=top)
            axes.set_title(f"cue: {cue}", fontsize=9)
    for axes in grid.flat:
        axes.set_axis_off()
    path = Path(folder) / "cues.png"
    figure.savefig(path, dpi=70)
    print(f"drawn: {path.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
