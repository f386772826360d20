"""The tree of segments and profiles, from what is stored of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_app.kv_cache.stored import Inner, Stored
from gateway_app.kv_cache.tree import entries, tier
from tasks.prompts.chain import hash_chain


def profile(agent: str, *texts: str) -> Stored:
    """Return a profile of these segments, each of ten tokens."""
    links = hash_chain(b"salt", [("role", text.encode()) for text in texts])
    chain = [Inner(link.hash[:32], 10 * count, f"kind {count}") for count, link in enumerate(links[:-1], 1)]
    return Stored(links[-1].hash, "acme", agent, 1, 10 * len(links), tuple(chain))


def test_a_run_of_segments_is_one_entry() -> None:
    """Where nothing parts there is nothing to show; kinds tell what the run is made of."""
    found = [profile("a", "x", "y", "1"), profile("b", "x", "y", "2"), profile("c", "z", "3")]
    run, a, b, c = entries(found, {}, {})
    assert (run.kinds, run.tokens, run.profiles, run.stored) == (("kind 1", "kind 2"), 20, 2, None)
    assert [(each.stored.agent if each.stored else None, each.parent, each.kinds) for each in (a, b, c)] == [
        ("a", run.link, ()),
        ("b", run.link, ()),
        ("c", None, ("kind 1",)),
    ]


texts = st.lists(st.sampled_from("xyz"), min_size=1, max_size=4).map(tuple)


@given(st.lists(texts, min_size=1, max_size=8))
@settings(deadline=None)
def test_every_profile_is_there_once_below_what_it_shares(chosen: list[tuple[str, ...]]) -> None:
    """Also those that say the same, and those that others extend; each entry comes after its parent, with more tokens."""
    found = [profile(f"agent {number}", *each) for number, each in enumerate(chosen)]
    made = entries(found, {}, {})
    assert sorted(each.stored.agent for each in made if each.stored) == sorted(each.agent for each in found)
    seen: dict[str | None, tuple[int, int]] = {None: (-1, 0)}
    for each in made:
        depth, tokens = seen[each.parent]
        assert each.depth == depth + 1
        assert each.tokens >= tokens
        if each.stored is None:
            below = [one for one in found if each.link in [*(inner.link for inner in one.chain), one.links[-1][:32]]]
            assert (each.tokens % 10, each.profiles) == (0, len(below))
            assert each.profiles > 1
            seen[each.link] = each.depth, each.tokens
        else:
            assert each.parent is None or each.parent in [*(link[:32] for link in each.stored.links)]


def test_ends_that_do_not_fit_together() -> None:
    """As releases may store them that find other ends: nothing is shared then, and nothing is missing."""
    one, other = profile("a", "x", "y", "1"), profile("b", "x", "y", "2")
    odd = Stored(other.static_profile_hash, "acme", "b", 1, 30, other.chain[1:])
    first, second = entries([one, odd], {}, {})
    assert [(each.stored.agent if each.stored else None, each.parent) for each in (first, second)] == [
        ("a", None),
        ("b", None),
    ]


def test_tiers() -> None:
    """The fastest memory that has all of it."""
    held = {(9, 9, 9): "part", (9, 9, 10): "disk", (0, 10, 10): "ram", (10, 10, 10): "gpu"}
    assert {each: tier(each, 10) for each in held} == held
