"""Who computes what in the next step. Knows tokens and blocks, neither models nor text.

Answers that are being made come first, a token each; what is left of the step's tokens goes to prompts, in order of
arrival and in chunks, so that a long prompt holds nobody up. Where memory runs out, the youngest request gives its
blocks back and waits at the head of the queue with what it has made.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from packlight.runtime.serving.blocks import BLOCK, BlockPool
from packlight.runtime.serving.sequence import Sequence


@dataclass(frozen=True)
class Part:
    """What one sequence computes in a step: its next `count` tokens."""

    sequence: Sequence
    count: int


class Scheduler:
    """The queue and the batch.

    Args:
        pool: the blocks.
        users: sequences that are computed at once, at most.
        step_tokens: tokens of a step, at most; no fewer than `users`.
    """

    def __init__(self, pool: BlockPool, users: int, step_tokens: int) -> None:
        self.pool, self.users, self.step_tokens = pool, users, max(users, step_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.preemptions = 0

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, request_id: str) -> None:
        """Forget a request, wherever it is."""
        for sequence in [one for one in self.running if one.request.id == request_id]:
            self.retire(sequence)
        self.waiting = deque(one for one in self.waiting if one.request.id != request_id)

    def retire(self, sequence: Sequence) -> None:
        """A running sequence is done: its blocks are free."""
        self.running.remove(sequence)
        sequence.leave(self.pool)

    def expired(self) -> list[Sequence]:
        """Those whose time is up; they are forgotten."""
        now = time.monotonic()
        late = [
            one
            for one in (*self.running, *self.waiting)
            if one.request.deadline is not None and one.request.deadline <= now
        ]
        for sequence in late:
            self.remove(sequence.request.id)
        return late

    def schedule(self) -> list[Part]:
        """The parts of the next step, with room in their blocks."""
        parts = self._decode()
        room = self.step_tokens - len(parts)
        for sequence in [one for one in self.running if one.left > 1]:
            room -= _read(parts, sequence, room)
        while self.waiting and len(self.running) < self.users and room > 0 and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            room -= _read(parts, sequence, room)
        return parts

    def borrow(self, tokens: int) -> list[int]:
        """Blocks for a text that is no request, if need be those of the youngest; to be released by the caller.

        The pool has room for `tokens` tokens when nobody else holds any.
        """
        count = -(-tokens // BLOCK)
        while (taken := self.pool.allocate(count)) is None:
            self._put_back(self.running[-1])
        return taken

    def _decode(self) -> list[Part]:
        """A token for everybody who is past the prompt, the oldest first."""
        decoding = [one for one in self.running if one.left == 1]
        ready = [one for one in decoding if one in self.running and self._reserve(one)]
        return [Part(one, 1) for one in ready if one in self.running]

    def _admit(self, sequence: Sequence) -> bool:
        """Hold blocks for all its tokens, where there are as many and one more for everybody who runs."""
        if self._is_being_read(sequence):
            return False
        if -(-len(sequence.tokens) // BLOCK) + len(self.running) > self.pool.free:
            return False
        sequence.begin(self.pool)
        is_reserved = sequence.reserve(self.pool, len(sequence.tokens))
        assert is_reserved
        return True

    def _is_being_read(self, sequence: Sequence) -> bool:
        """Whether somebody who runs is about to compute its next block: it waits for that instead of doing it too."""
        end = (self.pool.known(sequence.tokens) + 1) * BLOCK
        if end >= len(sequence.tokens):
            return False
        beginning = sequence.tokens[:end]
        return any(one.left > 1 and one.tokens[:end] == beginning for one in self.running)

    def _reserve(self, sequence: Sequence) -> bool:
        """Room for its next token, if need be that of the youngest; False where it was the youngest itself."""
        while not sequence.reserve(self.pool, len(sequence.tokens)):
            youngest = self.running[-1]
            self._put_back(youngest)
            if youngest is sequence:
                return False
        return True

    def _put_back(self, sequence: Sequence) -> None:
        """A running sequence gives its blocks back and is the next to be admitted; what it has made stays."""
        self.running.remove(sequence)
        sequence.leave(self.pool)
        self.waiting.appendleft(sequence)
        self.preemptions += 1


def _read(parts: list[Part], sequence: Sequence, room: int) -> int:
    """Add a chunk of a prompt to the step; returns its tokens."""
    count = min(room, sequence.left)
    if count > 0:
        parts.append(Part(sequence, count))
    return count
