"""Pictures of records: what is drawn where, on whose axes, in colours that everybody can tell apart."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise

import pytest
import torch

import fastattn
from fastattn.inspect import (
    Record,
    RecordedCall,
    alignment_map,
    attention_map,
    entropy_map,
    head_grid,
    heatmap,
    pictures,
    received,
    received_map,
    record,
    show_heatmaps,
    summarize,
    to_bertviz,
)
from fastattn.masks import causal
from fastattn.models import Encoder, Transformer

matplotlib = pytest.importorskip("matplotlib")
SOURCE, TARGET = ["the", "cat", "sat", "图像"], ["猫", "坐", "<end>"]


@pytest.fixture(autouse=True)
def agg():
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield
    pyplot.close("all")


@pytest.mark.parametrize(
    "draw",
    [
        lambda rec: attention_map(rec, rec.paths[0]),
        head_grid,
        entropy_map,
        lambda rec: received_map(torch.ones(3)),
        lambda rec: received_map(torch.ones(3), ["猫", "坐", "a"]),
        lambda rec: alignment_map(torch.ones(3, 4), TARGET, SOURCE),
        lambda rec: heatmap(torch.ones(3, 4), TARGET, SOURCE),
        lambda rec: show_heatmaps(torch.ones(1, 1, 3, 4), "keys", "queries"),
    ],
)
def test_without_matplotlib_every_picture_names_the_extra(draw, monkeypatch):
    with record() as rec:
        fastattn.attention(*[torch.randn(1, 2, 3, 4)] * 3)
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pictures need matplotlib: pip install 'fastattn\[viz\]'"):
        draw(rec)


@pytest.fixture
def own():
    """Axes that belong to the caller."""
    from matplotlib.figure import Figure

    return Figure().subplots()


@pytest.fixture
def rec():
    torch.manual_seed(0)
    model = Transformer(20, 20, d_model=16, num_layers=2, num_heads=4, d_ff=32).eval()
    src, tgt = torch.randint(20, (1, 4)), torch.randint(20, (1, 3))
    with torch.no_grad(), record(model, tokens=SOURCE, target_tokens=TARGET) as found:
        model(src, tgt)
    return found


def long_record(length, pool=64, weights_up_to=512, **options):
    torch.manual_seed(0)
    model = Encoder(16, 1, num_heads=2, d_ff=16)
    with torch.no_grad(), record(model, pool=pool, weights_up_to=weights_up_to, **options) as found:
        model(torch.randn(1, length, 16), mask=causal())
    return found


def drawn(axes):
    return torch.tensor(axes.images[-1].get_array().filled(float("nan")).tolist())


def texts(labels):
    return [label.get_text() for label in labels]


CROSS = "decoder.layers.1.cross_attn"


def test_attention_map(rec, own):
    axes = attention_map(rec, CROSS, 2)
    torch.testing.assert_close(drawn(axes), rec.weights(CROSS)[2])
    assert texts(axes.get_xticklabels()) == SOURCE and texts(axes.get_yticklabels()) == TARGET
    assert axes.get_title() == f"{CROSS}, head 2"
    assert axes.images[0].get_clim() == (0, rec.weights(CROSS)[2].max().item())
    assert attention_map(rec, CROSS, ax=own, title="t") is own and own.get_title() == "t"
    torch.testing.assert_close(drawn(own), rec.weights(CROSS).mean(0))
    with pytest.raises(IndexError, match="head must be from 0 to 3, got 4"):
        attention_map(rec, CROSS, 4)
    with pytest.raises(KeyError, match="no call of 'x' was recorded"):
        attention_map(rec, "x")


def test_attention_map_without_tokens_has_numbers(rec):
    rec.attach({})
    axes = attention_map(rec, CROSS)
    axes.figure.canvas.draw()
    assert texts(axes.get_xticklabels())[1:3] == ["0", "1"]


def test_512_tokens_can_be_read():
    """Labels do not overlap, every link has a pixel, and the picture has a size for a screen."""
    found = long_record(512, tokens=[f"token{n}" for n in range(512)])
    axes = attention_map(found, "layers.0.self_attn", 0)
    figure = axes.figure
    figure.canvas.draw()
    assert max(figure.get_size_inches()) <= 14
    for labels, side in ((axes.get_xticklabels(), "x"), (axes.get_yticklabels(), "y")):
        boxes = [label.get_window_extent() for label in labels]
        assert 30 <= len(boxes) <= 512 and texts(labels)[1].startswith("token")
        starts = sorted(getattr(box, f"{side}0") for box in boxes)
        thickness = max(getattr(box, "width" if side == "x" else "height") for box in boxes)
        assert min(b - a for a, b in pairwise(starts)) >= 0.8 * thickness
    assert axes.get_window_extent().width >= 512
    shares = received_map(found.received("layers.0.self_attn")[0], found.texts("layers.0.self_attn")[0])
    assert texts(shares.texts) == [f"token{n}" for n in range(512)]
    shares.figure.canvas.draw()
    lines = {}
    for text, patch in zip(shares.texts, shares.patches, strict=True):
        box, place = text.get_window_extent(), patch.get_window_extent()
        assert place.x0 <= box.x0 and box.x1 <= place.x1  # each token within its own shade
        lines.setdefault(round(place.y0), []).append(place)
    for line in lines.values():
        assert all(a.x1 <= b.x0 for a, b in pairwise(line))


def test_long_calls_are_drawn_pooled():
    found = long_record(1500)
    axes = attention_map(found, "layers.0.self_attn", 1)
    torch.testing.assert_close(drawn(axes), found.calls[0].summary.pooled[0, 1])
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 1500), (1500, 0))  # ticks are token positions
    head_grid(found)
    curve = received_map(found.received("layers.0.self_attn").mean(0))
    assert curve.get_xlim() == (0, 1500)
    found = long_record(600, pool=None)
    with pytest.raises(ValueError, match="must be one call with a pooled map, got no pooled map"):
        attention_map(found, "layers.0.self_attn")


def test_32k_is_drawn_from_its_summary():
    heads, length = 4, 32768
    part = summarize(torch.randn(1, heads, 64, 8), torch.randn(1, heads, 64, 8), top_k=1, pool=64).detach()
    rows = {name: getattr(part, name).repeat_interleave(length // 64, 2) for name in ("entropy", "received")}
    whole = type(part)(**{**part.tensors(), **rows, "max_index": rows["entropy"].long()})
    found = Record([RecordedCall("attn", whole)])
    start = time.perf_counter()
    for axes in (attention_map(found, "attn"), head_grid(found), received_map(found.received("attn")[0])):
        axes.figure.canvas.draw()
    assert time.perf_counter() - start < 20
    assert attention_map(found, "attn").get_xlim() == (0, length)


def test_head_grid(rec, own):
    axes = head_grid(rec, title="heads")
    assert len(axes.images) == 6 * 4
    torch.testing.assert_close(drawn(axes), rec.weights(CROSS)[3])
    assert texts(axes.get_yticklabels()) == rec.paths and texts(axes.get_xticklabels()) == list("0123")
    assert head_grid(rec, own, layers=[CROSS]) is own and len(own.images) == 4
    axes.figure.canvas.draw()
    window = axes.figure.get_window_extent()
    assert all(label.get_window_extent().x0 >= window.x0 for label in axes.get_yticklabels())
    with pytest.raises(ValueError, match="record must hold calls, got none"):
        head_grid(Record())


def test_entropy_map(rec, own):
    axes = entropy_map(rec)
    torch.testing.assert_close(drawn(axes), torch.stack([rec.entropy(path) for path in rec.paths]))
    assert texts(axes.texts)[0] == f"{rec.entropy(rec.paths[0])[0]:.2f}"
    assert entropy_map(rec, own, title="t") is own and own.get_title() == "t"
    with pytest.raises(ValueError, match="record must hold calls, got none"):
        entropy_map(Record())


def test_entropy_map_of_modules_with_different_heads():
    layers = [fastattn.nn.MultiheadAttention(8, heads, batch_first=True) for heads in (1, 4)]
    model = torch.nn.ModuleList(layers)
    with record(model) as found:
        for layer in layers:
            layer(torch.randn(1, 3, 8))
    values = drawn(entropy_map(found))
    assert values.isfinite().tolist() == [[True, False, False, False], [True] * 4]
    head_grid(found)


def test_received_map_shades_tokens(rec, own):
    values = rec.received("encoder.layers.0.self_attn").mean(0)
    axes = received_map(values, SOURCE)
    assert texts(axes.texts) == SOURCE
    darkness = [-sum(patch.get_facecolor()[:3]) for patch in axes.patches]
    assert sorted(range(4), key=darkness.__getitem__) == values.argsort().tolist()
    assert received_map(values, SOURCE, own) is own
    with pytest.raises(
        ValueError, match=r"received must be \[2\], one for each token, and not empty, got shape"
    ):
        received_map(values, ["a", "b"])
    with pytest.raises(ValueError, match=r"received must be \[keys\] and not empty, got shape \[1, 4\]"):
        received_map(values[None])


def test_alignment_map(rec, own):
    weights = rec.weights(CROSS).mean(0)
    axes = alignment_map(weights, TARGET, SOURCE, title="t")
    torch.testing.assert_close(drawn(axes), weights)
    dots = axes.collections[0].get_offsets().tolist()
    assert dots == [[best, row] for row, best in enumerate(weights.argmax(1).tolist())]
    assert alignment_map(weights, TARGET, SOURCE, own) is own


def test_heatmap_numbers_where_there_are_no_labels(own):
    axes = heatmap(torch.eye(3), ax=own)
    assert drawn(axes).tolist() == torch.eye(3).tolist()
    with pytest.raises(ValueError, match=r"weights must be \[queries, keys\], here \[3, 2\] by the labels"):
        heatmap(torch.eye(3), keys=["a", "b"], ax=own)


# Machado, Oliveira and Fernandes 2009: how red-, green- and blue-blind eyes see linear RGB.
BLIND = {
    "full vision": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("name", [pictures.WEIGHTS, received.STRENGTH, pictures.ENTROPY, "Reds"])
@pytest.mark.parametrize("eyes", BLIND)
def test_colours_get_steadily_darker_or_lighter(name, eyes):
    colours = torch.tensor(matplotlib.colormaps[name](range(256)))[:, :3].double()
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = (linear @ torch.tensor(BLIND[eyes], dtype=torch.float64).T).clamp(0, 1)
    lightness = (seen @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)) ** (1 / 3)
    steps = lightness[8::8] - lightness[:-8:8]
    assert (steps > 0).all() or (steps < 0).all()


def test_to_bertviz(rec):
    kinds = to_bertviz(rec)
    assert [kind["name"] for kind in kinds] == ["Encoder", "Decoder", "Cross"]
    assert [(kind["left_text"], kind["right_text"]) for kind in kinds] == [
        (SOURCE, SOURCE),
        (TARGET, TARGET),
        (TARGET, SOURCE),
    ]
    want = torch.stack([rec.weights(f"decoder.layers.{n}.cross_attn") for n in range(2)])
    torch.testing.assert_close(torch.tensor(kinds[2]["attn"]), want)  # [layer][head][query][key]
    json.dumps(kinds)
    (single,) = to_bertviz(long_record(6))
    assert single["name"] is None and single["left_text"] == [str(n) for n in range(6)]


def test_to_bertviz_wants_one_shape(rec):
    layers = [fastattn.nn.MultiheadAttention(8, heads, batch_first=True) for heads in (1, 4)]
    with record(torch.nn.ModuleList(layers)) as found:
        for layer in layers:
            layer(torch.randn(1, 3, 8))
    with pytest.raises(
        ValueError, match="layers must have the same heads, queries and keys for BertViz, got"
    ):
        to_bertviz(found)
    with pytest.raises(ValueError, match=r"weights of .* are not in the record"):
        to_bertviz(long_record(40, weights_up_to=8))
    with pytest.raises(ValueError, match="record must hold calls, got none"):
        to_bertviz(Record())


@pytest.mark.parametrize("count", [8, 60, 400])
def test_received_map_has_every_box_within(count):
    axes = received_map(torch.ones(count), ["token"] * count)
    edges = [patch.get_x() + patch.get_width() for patch in axes.patches]
    assert len(edges) == count and max(edges) <= axes.get_xlim()[1]


def test_received_map_of_one_long_token():
    axes = received_map(torch.ones(2), ["x" * 300, "y"])
    assert max(patch.get_x() + patch.get_width() for patch in axes.patches) <= axes.get_xlim()[1]


@pytest.mark.parametrize("text", ["$\\frac$", "$5", "$a^$", "\n\n", "\x00", "\ud800"])
def test_labels_are_no_formulas(text):
    """What would be mathematics, or nothing at all, is drawn as it reads."""
    for axes in (
        heatmap([[1.0]], [text], [text], title=text),
        received_map([1.0], [text], title=text),
        alignment_map([[1.0]], [text], [text], title=text),
        show_heatmaps([[[[1.0]]]], text, text, [text]).axes[0],
    ):
        axes.figure.canvas.draw()
    assert heatmap([[1.0]], ["a\n"], ["$"]).get_yticklabels()[0].get_text() == "a\\n"


def test_a_long_title_stays_in_the_picture():
    title = "model.decoder.layers.11.encoder_attn, mean over heads"
    axes = alignment_map(torch.eye(7), list("abcdefg"), list("abcdefg"), title=title)
    axes.figure.canvas.draw()
    window, box = axes.figure.get_window_extent(), axes.title.get_window_extent()
    assert window.x0 <= box.x0 and box.x1 <= window.x1
    assert heatmap(torch.eye(7), title="short").title.get_size() == 12
