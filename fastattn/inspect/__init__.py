"""Looking at what a model attends to: statistics, records, pictures, and what happens without."""

from fastattn.inspect.bertviz import to_bertviz
from fastattn.inspect.pictures import alignment_map, attention_map, entropy_map, head_grid
from fastattn.inspect.plots import heatmap, show_heatmaps
from fastattn.inspect.received import received_map
from fastattn.inspect.recorded import Record, RecordedCall
from fastattn.inspect.recorder import record
from fastattn.inspect.removal import knockout
from fastattn.inspect.summary import AttentionSummary, summarize

__all__ = [
    "AttentionSummary",
    "Record",
    "RecordedCall",
    "alignment_map",
    "attention_map",
    "entropy_map",
    "head_grid",
    "heatmap",
    "knockout",
    "received_map",
    "record",
    "show_heatmaps",
    "summarize",
    "to_bertviz",
]
