"""Keys and values kept between answers, so that a conversation's next turn does not read its beginning again.

Promises that a cache is only ever used for the ids it was filled with: any doubt drops it. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences share from the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


class PrefixCache:
    """The keys and values of the last conversation answered."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
        self.supported = bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        """Whether a cache of this model can be filled in pieces. Others keep a state of their own kind."""
        # A sliding window has forgotten what a shorter prefix would need.
        self._reusable = kinds == {DynamicLayer}
        self._kept: tuple[DynamicCache, list[int], object] | None = None

    def take(self, ids: Sequence[int], wearer: object = None) -> DynamicCache:
        """A cache that holds the keys and values of a prefix of `ids`, at most all but the last; empty where none fits.

        What was kept is no longer here until `keep` is called again.

        Args:
            ids: of the prompt.
            wearer: tells the adapter that the model wears; keys and values of another are never used.
        """
        kept, self._kept = self._kept, None
        if kept is not None and self._reusable and kept[2] == wearer:
            cache, cached_ids, _ = kept
            length = cache.get_seq_length()
            shared = min(common_prefix(cached_ids, ids), len(ids) - 1)
            if shared and length == len(cached_ids):
                cache.crop(shared - length)
                return cache
        return DynamicCache(config=self._config)

    def keep(self, cache: DynamicCache, ids: Sequence[int], wearer: object = None) -> None:
        """Keep a cache with the ids that it was filled with.

        Args:
            cache: one that `take` gave. Where reading was stopped between two layers, some hold more than others: what
                not all of them hold is cut off.
            ids: may be longer than what the cache holds.
            wearer: as `take` was told.
        """
        layers: list[Any] = list(cache.layers)
        lengths = [layer.get_seq_length() for layer in layers]
        length = min(lengths)
        if self._reusable and 0 < length <= len(ids):
            for layer, held in zip(layers, lengths, strict=True):
                layer.crop(length - held)
            self._kept = (cache, list(ids[:length]), wearer)

    def drop(self) -> None:
        """Keep nothing."""
        self._kept = None
