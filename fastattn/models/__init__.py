"""Reference models, built of fastattn's layers or, for comparison, of PyTorch's."""

from fastattn.models.cache import DecoderCache, LayerCache
from fastattn.models.generation import Generated, beam_search, greedy
from fastattn.models.layers import DecoderLayer, EncoderLayer
from fastattn.models.seq2seq import RecurrentSeq2Seq
from fastattn.models.stacks import Decoder, Encoder
from fastattn.models.transformer import Transformer

__all__ = [
    "Decoder",
    "DecoderCache",
    "DecoderLayer",
    "Encoder",
    "EncoderLayer",
    "Generated",
    "LayerCache",
    "RecurrentSeq2Seq",
    "Transformer",
    "beam_search",
    "greedy",
]
