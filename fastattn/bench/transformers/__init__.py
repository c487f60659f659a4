"""Models of Hugging Face transformers on fastattn, sdpa and eager: writing text, and training steps.

Everything is random: what is measured is time and memory, which do not depend on what a model knows.
"""

from fastattn.bench.transformers.rows import HEADER, Row, summary
from fastattn.bench.transformers.run import run

__all__ = ["HEADER", "Row", "run", "summary"]
