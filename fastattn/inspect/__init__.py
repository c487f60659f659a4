"""Looking at what a model attends to."""

from fastattn.inspect.plots import heatmap, show_heatmaps

__all__ = ["heatmap", "show_heatmaps"]
