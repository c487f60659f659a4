"""Looking at what a model attends to."""

from fastattn.inspect.plots import heatmap, show_heatmaps
from fastattn.inspect.removal import knockout
from fastattn.inspect.summary import AttentionSummary, summarize

__all__ = ["AttentionSummary", "heatmap", "knockout", "show_heatmaps", "summarize"]
