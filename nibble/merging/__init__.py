"""A model out of a base and an adapter: W + scale·B·A, written tensor by tensor, and proven from what was written.

    changes     what an adapter changes, as products of two small matrices, and what speaks against it
    base        the full-precision model that a low-bit base was made from
    writing     the merged folder's files
    proof       every tensor of the files compared with the base's: changed by just that, or the same bytes
    logits      base and adapter beside the merged model on a few prompts
    survival    what is left of the change in low bit
    session     all of it, whole or nothing

Promises that a merge which is not proven leaves no folder. Importing the package imports no torch.
"""
