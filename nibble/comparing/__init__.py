"""What fine-tuning changed: a base, its tuned form and any checkpoint, side by side on the same prompts.

    order   what is compared: a base in the form it was trained in, and the adapters put on it in turn
    bench   answers, held-out loss and what was forgotten, on one loaded base
    page    the report as one HTML file           table   the same as lines of text

`order`, `page` and `table` import no torch.
"""
