"""How a text goes through a decoder one block at a time.

By the model's own forward pass: no architecture is known by name. Only one block's graph, and one block's activations, are
held at a time.
"""
