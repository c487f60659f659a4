"""What the functions of torch do to scores and weights that have not been computed.

Each rule returns what the function would, as a Lazy or (for weights times values) as the finished output, or
NotImplemented where that has no place in a call of attention; the values are then computed as written.
"""

from fastattn.integrations.handwritten.rules import biases, fills, forms, scaling, weights  # registers them

__all__ = ["biases", "fills", "forms", "scaling", "weights"]
