"""A low-bit model from any checkpoint, tensor by tensor: nothing but one tensor and one shard is in memory.

Promises the very tensors that loading the checkpoint in low bit and saving it would write, and a folder that is whole
or not there. What already has the wanted form is taken as it is, bit for bit.
"""

from nibble.packing.planning import Packing, Plan, plan
from nibble.packing.writing import Packed, pack

__all__ = ["Packed", "Packing", "Plan", "pack", "plan"]
