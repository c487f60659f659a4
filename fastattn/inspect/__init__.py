"""Looking at what a model attends to."""

from fastattn.inspect.plots import heatmap, show_heatmaps
from fastattn.inspect.recorded import Record, RecordedCall
from fastattn.inspect.recorder import record
from fastattn.inspect.removal import knockout
from fastattn.inspect.summary import AttentionSummary, summarize

__all__ = [
    "AttentionSummary",
    "Record",
    "RecordedCall",
    "heatmap",
    "knockout",
    "record",
    "show_heatmaps",
    "summarize",
]
