"""The memory of the KV cache in blocks: who holds which, and what blocks still hold for those who come later.

A whole block is known by its tokens and all tokens before it, so that a request that begins like an earlier one finds
its keys and values computed. A block that nobody holds keeps what it knows until its room is needed, the one that was
left longest first. Numbers only; the tensors are `PagedModel`'s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 16
"""Tokens of a block."""

Key = tuple[int, tuple[int, ...]]
"""Id of the content before a block, and its own tokens."""

ROOT = 0
"""The content id of nothing."""


class BlockPool:
    """Blocks 0 to `count - 1`, each held by any number of sequences."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._empty = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._left: OrderedDict[int, None] = OrderedDict()  # known, and held by nobody
        self._block_of: dict[Key, tuple[int, int]] = {}  # what is known -> its block and its content id
        self._key_of: dict[int, Key] = {}
        self._next_content = ROOT + 1

    @property
    def free(self) -> int:
        """Blocks that can be allocated."""
        return len(self._empty) + len(self._left)

    @property
    def held(self) -> int:
        """Blocks that somebody holds."""
        return self.count - self.free

    def match(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The blocks of the longest known beginning of `tokens`, and its content id; the caller holds them now.

        The last token is left out: it has to be computed, as its logits are wanted.
        """
        found, content = self._find(tokens)
        for block in found:
            self._left.pop(block, None)
            self._holders[block] += 1
        return found, content

    def known(self, tokens: Sequence[int]) -> int:
        """How many blocks `match` would find."""
        return len(self._find(tokens)[0])

    def _find(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        found: list[int] = []
        content = ROOT
        for start in range(0, (len(tokens) - 1) // BLOCK * BLOCK, BLOCK):
            known = self._block_of.get((content, tuple(tokens[start : start + BLOCK])))
            if known is None:
                break
            block, content = known
            found.append(block)
        return found, content

    def allocate(self, count: int) -> list[int] | None:
        """So many blocks, which the caller holds now; None, and nothing happens, where there are not as many."""
        if count > self.free:
            return None
        taken = []
        for _ in range(count):
            block = self._empty.pop() if self._empty else self._forget()
            self._holders[block] = 1
            taken.append(block)
        return taken

    def publish(self, block: int, before: int, tokens: Sequence[int]) -> int:
        """Say what a full block holds: `tokens` behind the content `before`; returns the content id up to here."""
        key = (before, tuple(tokens))
        known = self._block_of.get(key)
        if known is not None:  # somebody else computed the same at the same time: this block stays unknown
            return known[1]
        content = self._next_content
        self._next_content += 1
        self._block_of[key] = (block, content)
        self._key_of[block] = key
        return content

    def release(self, blocks: Sequence[int]) -> None:
        """Hold these no longer. The last goes first, so that beginnings outlive what follows them."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0
            if self._holders[block]:
                continue
            if block in self._key_of:
                self._left[block] = None
            else:
                self._empty.append(block)

    def _forget(self) -> int:
        block, _ = self._left.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
