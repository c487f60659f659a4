"""One file or folder per backend. Backends never import one another; fastattn.dispatch orders them.

`common` is what those with kernels of their own share.
"""
