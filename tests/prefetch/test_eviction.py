"""What goes first."""

from offload.prefetch.eviction import LeastRecentlyUsed


def test_what_was_not_used_for_longest_goes_first_and_what_only_passes_before_that() -> None:
    policy: LeastRecentlyUsed[str] = LeastRecentlyUsed()
    for key in "abc":
        policy.add(key)
    policy.use("a")
    policy.add("p", passing=True)
    gone = []
    while (key := policy.victim(())) is not None:
        gone.append(key)
        policy.remove(key)
    assert gone == ["p", "b", "c", "a"]


def test_what_must_stay_is_passed_over() -> None:
    policy: LeastRecentlyUsed[str] = LeastRecentlyUsed()
    for key in "abc":
        policy.add(key)
    assert policy.victim({"a", "b"}) == "c"
    assert policy.victim("abc") is None
