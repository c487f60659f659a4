"""Loaders of real text from what is installed on the machine; nothing is downloaded or shipped."""

from fastattn.data.stdlib_docs import StdlibDocs, load_stdlib_docs

__all__ = ["StdlibDocs", "load_stdlib_docs"]
