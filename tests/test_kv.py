from __future__ import annotations

import pytest

from offload.errors import ContextError
from offload.kv import CachedTokens


def test_the_common_prefix_is_kept_and_the_last_token_computed_again() -> None:
    cache = CachedTokens(8)
    assert cache.reuse([1, 2, 3]) == 0
    cache.append([1, 2, 3])
    assert cache.reuse([1, 2, 3]) == 2
    assert len(cache) == 2


def test_a_different_prompt_drops_what_follows_the_difference() -> None:
    cache = CachedTokens(8)
    cache.append([1, 2, 3, 4])
    assert cache.reuse([1, 2, 9, 4, 5]) == 2
    assert len(cache) == 2


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    cache = CachedTokens(3)
    cache.append([1, 2])
    with pytest.raises(ContextError) as caught:
        cache.reuse([1, 2, 3, 4])
    assert (caught.value.needed_tokens, caught.value.available_tokens) == (4, 3)
    assert len(cache) == 2
