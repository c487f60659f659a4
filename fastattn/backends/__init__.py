"""One file per backend. Backends never import one another; fastattn.dispatch orders them."""
