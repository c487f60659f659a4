"""Heat maps: what is drawn, how it is labelled, in which fonts."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from fastattn.inspect import fonts
from fastattn.inspect.plots import heatmap, show_heatmaps

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def agg():
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield
    pyplot.close("all")


@pytest.fixture
def no_cache():
    """Fonts are looked for anew, and forgotten afterwards."""
    for function in (fonts._fallbacks, fonts._candidates, fonts._characters):
        function.cache_clear()
    yield
    for function in (fonts._fallbacks, fonts._candidates, fonts._characters):
        function.cache_clear()


def test_show_heatmaps_draws_each_matrix():
    matrices = torch.rand(2, 3, 4, 5, requires_grad=True)
    figure = show_heatmaps(matrices, "Keys", "Queries", titles=["a", "b", "c"], figsize=(6, 4), cmap="Blues")
    *grid, colour_bar = figure.axes
    assert len(grid) == 6
    assert tuple(figure.get_size_inches()) == (6, 4)
    for number, axes in enumerate(grid):
        row, column = divmod(number, 3)
        image = axes.images[0]
        torch.testing.assert_close(torch.tensor(image.get_array()), matrices[row, column].detach())
        assert image.get_cmap().name == "Blues"
        assert image.get_clim() == (
            matrices.min().item(),
            matrices.max().item(),
        )  # one scale: the bar holds for all
        assert axes.get_title() == "abc"[column]
        assert axes.get_xlabel() == ("Keys" if row == 1 else "")
        assert axes.get_ylabel() == ("Queries" if column == 0 else "")
    assert colour_bar.get_ylim() == (matrices.min().item(), matrices.max().item())


def test_show_heatmaps_takes_arrays_and_half_precision():
    values = torch.eye(3)[None, None]
    for matrices in (values.numpy(), values.bfloat16(), values.tolist(), values.bool()):
        image = show_heatmaps(matrices, "k", "q").axes[0].images[0]
        assert image.get_array().tolist() == torch.eye(3).tolist()


@pytest.mark.parametrize("shape", [(3, 4), (1, 3, 4), (1, 0, 3, 4), (1, 1, 1, 3, 4)])
def test_show_heatmaps_wants_four_dimensions(shape):
    with pytest.raises(
        ValueError, match=r"matrices must be \[rows, columns, queries, keys\], none of them 0, got"
    ):
        show_heatmaps(torch.zeros(shape), "k", "q")


def test_show_heatmaps_wants_a_title_for_each_column():
    with pytest.raises(ValueError, match="titles must be one for each of 2 columns, got 3"):
        show_heatmaps(torch.zeros(1, 2, 3, 4), "k", "q", titles=["a", "b", "c"])


def test_heatmap_labels_rows_and_columns():
    weights = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.2, 0.8]])
    axes = heatmap(weights, ["一", "二"], ["first", "second", "third"], title="Layer")
    assert axes.images[0].get_array().tolist() == weights.tolist()
    assert axes.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["一", "二"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first", "second", "third"]
    assert axes.get_ylim() == (1.5, -0.5)  # the first query is on top
    assert axes.get_title() == "Layer"

    from matplotlib.figure import Figure

    own = Figure().subplots()
    assert heatmap(weights, "ab", "cde", ax=own) is own


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2,), (1, 2, 3)])
def test_heatmap_wants_a_label_for_each(shape):
    with pytest.raises(ValueError, match=r"weights must be \[queries, keys\], here \[2, 3\] by the labels"):
        heatmap(torch.zeros(shape), "ab", "cde")


def test_latin_labels_need_no_other_font():
    assert fonts.families_for(["Keys", "Queries 1/2"]) == list(matplotlib.rcParams["font.family"])


def test_chinese_labels_are_drawn_without_boxes(no_cache):
    families = fonts.families_for(["图像 file"])
    if len(families) == 1:
        pytest.skip("no Chinese font on this machine, nor zhplot")
    assert families[: len(matplotlib.rcParams["font.family"])] == matplotlib.rcParams["font.family"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each glyph that it has not
        axes = heatmap(torch.eye(2), "图像", ["键", "值"], title="注意力")
        axes.figure.canvas.draw()
        show_heatmaps(torch.eye(2)[None, None], "键", "查询", titles=["头"]).canvas.draw()


def test_without_a_font_one_warning_says_what_to_install(no_cache, monkeypatch):
    characters = fonts._characters
    monkeypatch.setattr(fonts, "_characters", lambda path: characters(path) - set("图像"))
    with pytest.warns(
        UserWarning, match=r"no font on this machine has '像图': .*pip install 'fastattn\[viz\]'"
    ):
        own = fonts.families_for(["图像"])
    assert own == list(matplotlib.rcParams["font.family"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fonts.families_for(["图像"]) == own


def test_several_fonts_share_the_work(no_cache, monkeypatch):
    have = {"own": "abc", "han": "图像", "thai": "ก", "box": ""}
    monkeypatch.setattr(fonts, "_characters", lambda path: frozenset(have.get(path, "abc")))
    monkeypatch.setattr(fonts, "_candidates", lambda: tuple((name, name) for name in have))
    assert fonts._fallbacks("กก像") == ("han", "thai")


def test_a_font_that_cannot_be_read_has_no_characters(no_cache, tmp_path):
    (tmp_path / "x.ttf").write_bytes(b"no font")
    assert fonts._characters(str(tmp_path / "x.ttf")) == frozenset()


def test_matplotlib_is_imported_when_something_is_drawn():
    code = "import sys, fastattn.inspect; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
