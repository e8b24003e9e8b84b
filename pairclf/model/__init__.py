"""The language model as a classifier: batches, layouts, attention, backbone, head, weights and memory, in torch."""
