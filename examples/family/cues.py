"""Cues: one image pooled without a query, by what stands out, and by what is looked for.

Without a query every patch counts the same, or as a linear layer has learned once and for all. By salience
alone (a non-volitional cue) what differs from the rest draws the eye, whatever one wants. By a query (a
volitional cue) one finds what one looks for.

python examples/family/cues.py [FOLDER]
"""

from pathlib import Path

import torch
from matplotlib import pyplot
from picture import picture_path
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from fastattn.nn import Attention

PATCH = 16  # pixels

SCALE = 6  # the weight at which colours end, in shares of 1 / (number of patches)
PLACES = {"the sky": (2, 4), "the roof": (9, 9), "the trees": (18, 36)}  # row and column of a patch


class LinearPooling(nn.Module):
    """A linear layer over the patches: it begins as their mean, and learns where to look, whoever asks."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.linear = nn.Linear(patches, 1, bias=False)
        nn.init.constant_(self.linear.weight, 1 / patches)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.linear(values.mT).mT

    @property
    def attention_weights(self) -> Tensor:
        return self.linear.weight.detach()[None]


def build_cues(keys: Tensor) -> dict[str, nn.Module]:
    """The same values, pooled in four ways; all but the linear layer have nothing to learn."""
    linear = LinearPooling(keys.shape[0] * keys.shape[1])
    train(linear, keys, keys[PLACES["the sky"]])
    return {
        "none, the mean": Attention(lambda q, k: q.new_zeros(1, q.shape[1], k.shape[1])),
        "none, a linear layer": linear,
        "salience of the keys": Attention(lambda q, k: salience(k).expand(-1, q.shape[1], -1)),
        "the query": Attention("cosine", temperature=0.05),
    }


def train(linear: LinearPooling, keys: Tensor, target: Tensor) -> None:
    """Learn to tell one patch from noisy copies of the whole image."""
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    values = keys.flatten(0, 1)
    for _ in range(200):
        noisy = values + torch.randn(8, *values.shape, generator=generator)
        loss = (linear(target, noisy, noisy) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


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


@torch.no_grad()
def look(cues: dict[str, nn.Module], keys: Tensor, query: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By each cue: the pooled value [D] and the weights [h, w]."""
    flat = keys.flatten(0, 1)[None]
    found = {}
    for name, attention in cues.items():
        pooled = attention(query.view(1, 1, -1), flat, flat)
        found[name] = pooled[0, 0], attention.attention_weights.view(keys.shape[:2])
    return found


def main(path: Path) -> None:
    image, keys = load_patches()
    cues = build_cues(keys)
    looks = {place: look(cues, keys, keys[at]) for place, at in PLACES.items()}

    print(f"{keys.shape[0] * keys.shape[1]} patches; how much of the weight moves when the query changes")
    for cue in cues:
        weights = [looks[place][cue][1] for place in PLACES]
        moved = max((a - b).abs().sum().item() / 2 for a in weights for b in weights)
        print(f"  {cue:<22}{moved:7.1%}")

    figure, grid = pyplot.subplots(len(PLACES), 1 + len(cues), figsize=(13, 5.6), layout="constrained")
    for row, (place, (i, j)) in zip(grid, PLACES.items(), strict=True):
        row[0].imshow(image)
        row[0].set_title(f"looking for {place}", fontsize=9)
        box = pyplot.Rectangle((j * PATCH, i * PATCH), PATCH, PATCH, fill=False, color="red", linewidth=2)
        row[0].add_patch(box)
        for axes, (cue, (_, weights)) in zip(row[1:], looks[place].items(), strict=True):
            axes.imshow(image.mean(-1), cmap="gray", alpha=0.35)
            extent = (0, image.shape[1], image.shape[0], 0)
            shares = weights * weights.numel()
            drawn = axes.imshow(shares, cmap="Reds", alpha=0.8, extent=extent, vmin=0, vmax=SCALE)
            axes.set_title(f"cue: {cue}", fontsize=9)
    for axes in grid.flat:
        axes.set_axis_off()
    figure.colorbar(
        drawn, ax=grid, label="weight x number of patches: 1 where all weigh the same", extend="both"
    )
    figure.savefig(path, dpi=70)
    print(f"drawn: {path.name}")


if __name__ == "__main__":
    main(picture_path("cues.png", __doc__))
