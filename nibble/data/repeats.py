"""Rows that were met before, found in a table of bounded size.

Promises at most 48 MiB, and to say when it keeps no more. Knows nothing of why a row repeats.
"""

from __future__ import annotations

import hashlib
from array import array

from nibble.data.rows import Row


class Seen:
    """The rows met so far, by a hash of 64 bits, in a table of bounded size.

    Open addressing with linear probing; at 3 million rows the chance of any false match is about 2.4e-7
    (n² / 2 / 2⁶⁴).
    """

    LARGEST = 2**22

    def __init__(self) -> None:
        self.size, self.count = 2**12, 0
        self.hashes, self.numbers = _zeros("Q", self.size), _zeros("I", self.size)

    @property
    def full(self) -> bool:
        """Whether no further row is kept."""
        return self.count >= self.LARGEST * 3 // 4

    def earlier(self, row: Row) -> int:
        """The number of an equal row met before; 0, and the row is kept, where there is none."""
        # No text holds a NUL by now, so nothing else can look like this joint.
        content = row.text or "\0".join(part for turn in row.messages for part in (turn["role"], turn["content"]))
        digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        key = int.from_bytes(digest, "little") or 1
        place = self._place(key)
        if self.hashes[place]:
            return self.numbers[place]
        if not self.full:
            self.hashes[place], self.numbers[place] = key, row.number
            self.count += 1
            if self.count * 4 > self.size * 3 and self.size < self.LARGEST:
                self._grow()
        return 0

    def _place(self, key: int) -> int:
        """Where a hash stands, or the free place where it belongs."""
        place = key % self.size
        while self.hashes[place] not in (0, key):
            place = (place + 1) % self.size
        return place

    def _grow(self) -> None:
        old = zip(self.hashes, self.numbers, strict=True)
        self.size *= 4
        self.hashes, self.numbers = _zeros("Q", self.size), _zeros("I", self.size)
        for key, number in old:
            if key:
                place = self._place(key)
                self.hashes[place], self.numbers[place] = key, number


def _zeros(kind: str, count: int) -> array[int]:
    return array(kind, bytes(array(kind).itemsize * count))
