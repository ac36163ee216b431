"""The guide: the small model embedded in Nibble, with the corpus, the trainer and the examination that made it.

Knows nothing of the page; at run time only the folder `guide/model` is used, like any other model folder.
"""
