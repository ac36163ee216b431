"""What a model will take, known before it is loaded: disk, memory, tokens a second, for each format.

Read from config.json and the headers of the weight files alone. Imports no torch.
"""

from nibble.estimate.cost import CONTEXT, Estimate, estimate, estimates, needed_bytes
from nibble.estimate.shape import Matrix, Shape, read_shape

__all__ = ["CONTEXT", "Estimate", "Matrix", "Shape", "estimate", "estimates", "needed_bytes", "read_shape"]
