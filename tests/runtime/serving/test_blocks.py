"""The pool of blocks against a plain model of it: nothing is held twice, lost, or found where it is not."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.runtime.serving.blocks import BLOCK, ROOT, BlockPool


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """A text that is computed as a sequence does it: what is known is held, the rest allocated and published."""
    held, content = pool.match(tokens)
    more = pool.allocate(-(-len(tokens) // BLOCK) - len(held))
    assert more is not None
    blocks = held + more
    for place in range(len(held), len(tokens) // BLOCK):
        content = pool.publish(blocks[place], content, tokens[place * BLOCK : (place + 1) * BLOCK])
    return blocks


def test_what_was_computed_is_found_again() -> None:
    pool = BlockPool(10)
    text = list(range(3 * BLOCK + 5))
    blocks = fill(pool, text)
    pool.release(blocks)
    assert pool.free == 10
    assert pool.match(text)[0] == blocks[:3]
    assert pool.match(text[: 2 * BLOCK + 1])[0] == blocks[:2]


def test_the_last_token_is_never_taken_as_known() -> None:
    pool = BlockPool(10)
    text = list(range(2 * BLOCK))
    pool.release(fill(pool, text))
    assert len(pool.match(text)[0]) == 1


def test_the_same_tokens_behind_others_are_something_else() -> None:
    pool = BlockPool(10)
    pool.release(fill(pool, [1] * BLOCK + [2] * BLOCK))
    assert pool.match([2] * BLOCK + [0])[0] == []
    assert len(pool.match([1] * BLOCK + [3] * (BLOCK + 1))[0]) == 1


def test_what_was_left_longest_is_forgotten_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4)
    first, second = [1] * (2 * BLOCK), [2] * (2 * BLOCK)
    pool.release(fill(pool, first))
    pool.release(fill(pool, second))
    assert pool.allocate(1) is not None
    assert len(pool.match([*first, 0])[0]) == 1  # its second block went
    assert len(pool.match([*second, 0])[0]) == 2


def test_too_many_are_refused_and_nothing_happens() -> None:
    pool = BlockPool(3)
    assert pool.allocate(4) is None
    assert pool.free == 3


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_order_of_requests_leaves_the_pool_whole(data: st.DataObject) -> None:
    """Texts of few different tokens, so that many of them share beginnings."""
    pool = BlockPool(12)
    contents: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end, as last published
    alive: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if alive and data.draw(st.booleans()):
            pool.release(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
            continue
        text = [data.draw(st.integers(0, 1))] * BLOCK * data.draw(st.integers(0, 3)) + [
            data.draw(st.integers(0, 2))
        ] * 5
        held, content = pool.match(text)
        for place, block in enumerate(held):
            assert contents[block] == tuple(text[: (place + 1) * BLOCK])
        more = pool.allocate(-(-len(text) // BLOCK) - len(held))
        if more is None:
            pool.release(held)
            continue
        blocks = held + more
        in_use = {block for other in alive for block in other}
        assert not in_use & set(more)
        for place in range(len(held), len(text) // BLOCK):
            content = pool.publish(blocks[place], content, text[place * BLOCK : (place + 1) * BLOCK])
            contents[blocks[place]] = tuple(text[: (place + 1) * BLOCK])
        alive.append(blocks)
        assert pool.held == len({block for other in alive for block in other})
    for blocks in alive:
        pool.release(blocks)
    assert pool.free == pool.count
    everything = pool.allocate(pool.count)
    assert everything is not None and sorted(everything) == list(range(pool.count))


def test_two_who_compute_the_same_at_once_share_what_is_known() -> None:
    pool = BlockPool(4)
    a, b = pool.allocate(1), pool.allocate(1)
    assert a is not None and b is not None
    assert pool.publish(a[0], ROOT, [7] * BLOCK) == pool.publish(b[0], ROOT, [7] * BLOCK)
    pool.release(a)
    pool.release(b)
    assert pool.match([7] * BLOCK + [1])[0] == a
