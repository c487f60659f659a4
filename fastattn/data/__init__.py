"""Loaders of real text from what is installed on the machine; nothing is downloaded or shipped."""

from fastattn.data.stdlib_docs import StdlibDocs, load_stdlib_docs
from fastattn.data.translation import EnglishChinese, Pair, load_english_chinese

__all__ = ["EnglishChinese", "Pair", "StdlibDocs", "load_english_chinese", "load_stdlib_docs"]
