"""Looking at what a model attends to."""
