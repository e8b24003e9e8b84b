"""Tensors: batches, layouts, the backbone, the head, and the bundle that holds them."""
