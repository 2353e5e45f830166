"""How a text goes through a decoder one block at a time, and what is seen on the way.

By the model's own forward pass: no architecture is known by name. Only one block's graph, and one block's activations, are
held at a time. Moments of inputs, gradients of outputs, losses and the model's own text are taken here.
"""
