import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offrl.core.tree import flatten, tree_map, unflatten

keys = st.text(st.characters(exclude_characters="/", exclude_categories=("Cs",)), min_size=1, max_size=8)
trees = st.dictionaries(
    keys,
    st.recursive(st.integers(0, 9).map(torch.tensor), lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3), max_leaves=8),
    max_size=4,
)


@given(trees)
def test_unflatten_inverts_flatten(tree):
    assert unflatten(flatten(tree)) == tree
    assert list(flatten(unflatten(flatten(tree)))) == list(flatten(tree))


def test_flatten_names_leaves_by_their_path():
    x, y = torch.ones(1), torch.ones(2)
    assert flatten({"b": {"c": x}, "a": y}) == {"b/c": x, "a": y}


@pytest.mark.parametrize(
    "tree, error, words",
    [
        ({"a": {"b": None}}, TypeError, "a/b is NoneType"),
        ({"a": 1.0}, TypeError, "a is float"),
        ({"a": {"b/c": torch.ones(1)}}, ValueError, "b/c"),
        ({"": torch.ones(1)}, ValueError, "''"),
        ({1: torch.ones(1)}, ValueError, "key 1"),
    ],
)
def test_flatten_refuses(tree, error, words):
    with pytest.raises(error, match=words):
        flatten(tree)


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a")])
def test_a_key_is_a_leaf_or_a_branch(paths):
    with pytest.raises(ValueError, match="both"):
        unflatten(dict.fromkeys(paths, torch.ones(1)))


def test_tree_map_matches_by_key_and_keeps_the_first_order():
    first = {"x": torch.tensor(1), "y": {"z": torch.tensor(2)}, "empty": {}}
    second = {"empty": {}, "y": {"z": torch.tensor(20)}, "x": torch.tensor(10)}
    both = tree_map(torch.add, first, second)
    assert both == {"x": 11, "y": {"z": 22}, "empty": {}}
    assert list(both) == list(first)


one = torch.ones(())


@pytest.mark.parametrize(
    "first, second, words",
    [
        ({"a": {"b": one}}, {"a": {"c": one}}, "/a/b"),
        ({"a": one}, {"a": one, "z": one}, "/z"),
        ({"a": one}, {"a": {"b": one}}, "/a: .*branch"),
        ({"a": {"b": one}}, {"a": one}, "/a: .*leaf"),
        ({"a": {"b": None}}, {"a": {"b": one}}, "/a/b: .*None"),
    ],
)
def test_tree_map_names_the_key_that_differs(first, second, words):
    with pytest.raises(ValueError, match=words):
        tree_map(torch.add, first, second)


def test_trees_run_inside_compile_and_the_transformations():
    def double(tree, other):
        return unflatten(flatten(tree_map(lambda x, y: x + y, tree, other)))

    tree = {"b": {"x": torch.arange(3.0)}, "a": torch.ones(3)}
    other = {"a": torch.ones(3), "b": {"x": torch.arange(3.0)}}
    want = {"b": {"x": torch.arange(3.0) * 2}, "a": torch.full((3,), 2.0)}
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")(tree, other)
    mapped = torch.func.vmap(double, in_dims=(tree_map(lambda _: 0, tree), 0))(tree, other)
    slope = torch.func.grad(lambda t: sum(leaf.sum() for leaf in flatten(double(t, t)).values()))(tree)
    for got in (compiled, mapped):
        assert tree_map(torch.equal, got, want) == {"b": {"x": True}, "a": True}
    assert flatten(slope)["b/x"].tolist() == [2, 2, 2]
