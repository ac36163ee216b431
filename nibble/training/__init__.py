"""Fine-tuning: what a run is told (`recipe`), what it is fed, how it learns, and what it leaves behind.

`recipe` and `checkpoints` import no torch: the page and the console read them.
"""
