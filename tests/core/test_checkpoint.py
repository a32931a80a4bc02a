import json
import os
import sys
import warnings

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offrl.core import checkpoint
from offrl.core.checkpoint import CheckpointError, Checkpoints, NewerFormatError, check_meta, load_file, restore, save_file
from offrl.core.tree import flatten, tree_map


def bits(leaf):
    return leaf.dtype, leaf.shape, leaf.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()


def same(left, right):
    """Equal keys, dtypes, shapes and bits."""
    left, right = flatten(left), flatten(right)
    return left.keys() == right.keys() and all(bits(left[key]) == bits(right[key]) for key in left)


def example(step=0):
    matrix = torch.arange(12.0).reshape(3, 4) + step
    return {
        "z": {"count": torch.tensor(step), "done": torch.tensor(True), "half": torch.tensor([1.5, float("nan")]).bfloat16()},
        "a": {"matrix": matrix, "transposed": matrix.t(), "row": matrix[1], "again": matrix, "none": torch.empty(0, 3)},
        "rng": torch.Generator().manual_seed(step).get_state(),
        "stateless": {"source": {}},
    }


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_every_kind_of_tensor_survives(tmp_path):
    tree = example(7)
    save_file(tmp_path / "policy", tree, {"algorithm": "iql", "layers": [256, 256]})
    loaded, meta = load_file(tmp_path / "policy")
    assert same(loaded, tree) and loaded["stateless"] == {"source": {}}
    assert meta == {"algorithm": "iql", "layers": [256, 256], "format": 1}
    loaded["a"]["row"].zero_()
    assert loaded["a"]["matrix"][1].any(), "tensors that shared storage are separate"
    assert all(leaf.data_ptr() % 64 == 0 for leaf in flatten(loaded).values() if leaf.numel()), "as torch aligns its own"


def test_any_safetensors_reader_opens_the_file(tmp_path):
    save_file(tmp_path / "policy.safetensors", example(), {})
    with safetensors.safe_open(tmp_path / "policy.safetensors", "np") as file:
        assert file.get_tensor("a/transposed").tolist() == example()["a"]["transposed"].tolist()
        assert json.loads(file.metadata()["offrl"])["format"] == 1


def test_no_header_is_taken_for_a_pickle_or_an_archive(tmp_path):
    """A file begins with the length of its header, which may well look like another format's mark."""
    begins = set()
    for padding in range(0, 20_000, 8):
        data = checkpoint._encode({}, {"padding": "." * padding})
        begins.add(data[:2])
        assert checkpoint._decode(data, "a file")[1]["padding"] == "." * padding
    assert {b"PK", b"\x80\x02"} <= begins


names = st.text(st.characters(exclude_characters="/", exclude_categories=("Cs",)), min_size=1, max_size=6)
kinds = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool])


@st.composite
def tensors(draw):
    shape, dtype = draw(st.lists(st.integers(0, 3), max_size=3)), draw(kinds)
    full = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).to(dtype)
    return draw(st.sampled_from([full, full.mT if full.dim() > 1 else full, full[..., ::2] if full.dim() else full]))


trees = st.dictionaries(names, st.recursive(tensors(), lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=6), max_size=4)
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names
metas = st.dictionaries(names, st.recursive(values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3)))


@settings(max_examples=60, deadline=None)
@given(trees, metas)
def test_save_and_load_round_trip(tmp_path_factory, tree, meta):
    path = tmp_path_factory.getbasetemp() / "round trip"
    save_file(path, tree, meta)
    loaded, said = load_file(path)
    assert same(loaded, tree)
    assert tree_map(lambda leaf, _: leaf, loaded, tree) == loaded, "the same branches, empty ones too"
    assert said == meta | {"format": 1}


@pytest.mark.parametrize(
    "tree, meta, words",
    [
        ({"a": {"b": 3}}, {}, "a/b is int"),
        ({"__metadata__": torch.ones(1)}, {}, "__metadata__"),
        ({"\udcff": torch.ones(1)}, {}, "surrogates"),
        ({}, {"path": os}, "not JSON serializable"),
    ],
)
def test_what_could_not_be_read_back_is_refused(tmp_path, tree, meta, words):
    with pytest.raises(CheckpointError, match=words):
        save_file(tmp_path / "policy", tree, meta)
    assert not list(tmp_path.iterdir())


def test_the_last_ones_are_kept_and_listed_newest_last(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    assert checkpoints.latest() is None
    for step in (0, 10, 2000, 1_234_567_890):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / ".offrl-0123.tmp").write_bytes(b"left by a writer that was killed")
        assert checkpoints.save(step, example(step), {"algorithm": "bc"}).name == f"step-{step:09d}.safetensors"
        saved = checkpoints.latest()
        assert saved.step == step and saved.meta == {"algorithm": "bc", "step": step, "format": 1} and same(saved.tree, example(step))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())["checkpoints"]
    assert [entry["step"] for entry in manifest] == [2000, 1_234_567_890]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"manifest.json", *(entry["file"] for entry in manifest)}


def test_going_back_leaves_the_later_steps_behind(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3, 2):
        checkpoints.save(step, example(step), {})
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-000000001.safetensors", "step-000000002.safetensors"]
    assert checkpoints.latest().step == 2


def test_keep_is_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)


def like():
    return {"critic": {"w": torch.zeros(3, 4), "b": torch.zeros(4)}, "step": torch.tensor(0), "none": {}}


def test_restore_follows_the_tree_that_it_is_to_be_like():
    target = like() | {"critic": {"w": torch.zeros(4, 3).t(), "b": torch.nn.Parameter(torch.zeros(4))}}
    saved = {"none": {}, "step": torch.tensor(5), "critic": {"b": torch.arange(4.0), "w": torch.ones(3, 4)}}
    got = restore(saved, target)
    assert same(got, saved) and list(got) == list(target) and list(got["critic"]) == ["w", "b"]
    assert got["critic"]["w"].stride() == (1, 3), "the layout decides which kernel runs, and so the last bits"
    assert not any(leaf.requires_grad for leaf in flatten(got).values())
    got["step"].add_(1)
    assert saved["step"] == 5 and target["step"] == 0


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t["critic"].pop("w"), r"lacks 'critic/w' of shape \(3, 4\); the nearest key is 'critic/b' of shape \(4,\)"),
        (
            lambda t: t["critic"].update(w2=torch.ones(2)),
            r"holds 'critic/w2' of shape \(2,\), unknown here; .* 'critic/w' of shape \(3, 4\)",
        ),
        (lambda t: t["critic"].update(w=torch.ones(4, 3)), r"'critic/w' has shape \(4, 3\) in the checkpoint and \(3, 4\) here"),
        (lambda t: t.update(step=torch.tensor(0.0)), "'step' has dtype torch.float32 in the checkpoint and torch.int64 here"),
        (lambda t: t.update(critic=torch.ones(1)), "lacks 'critic/w'"),
        (lambda t: t.pop("none"), "does not fit: /none"),
        (lambda t: t.clear(), r"lacks 'critic/w' of shape \(3, 4\)$"),
    ],
)
def test_restore_names_what_does_not_fit(change, words):
    tree = like()
    change(tree)
    with pytest.raises(CheckpointError, match=words):
        restore(tree, like())


def test_a_checkpoint_moves_to_the_device_of_the_tree():
    # the meta device stands for an accelerator: a leaf that stayed where it was saved would show
    got = restore(like(), tree_map(lambda leaf: leaf.to("meta"), like()))
    assert {leaf.device.type for leaf in flatten(got).values()} == {"meta"}


def test_check_meta():
    meta = {"format": 1, "algorithm": "iql", "obs_size": 17, "action_size": 6}
    check_meta(meta, {"algorithm": "iql", "obs_size": 17, "action_size": 6})
    for key, value, words in (
        ("algorithm", "td3bc", "another algorithm: 'iql', where this run has 'td3bc'"),
        ("obs_size", 11, "another observation size: 17, where this run has 11"),
        ("action_size", 3, "another action size: 6, where this run has 3"),
        ("algoritm", "iql", "does not say its algoritm; 'iql' is expected; the nearest key is 'algorithm'"),
    ):
        with pytest.raises(CheckpointError, match=words):
            check_meta(meta, {key: value})
    spec = {"obs": {"low": [None] * 17}, "env_id": "a"}
    check_meta({"spec": spec}, {"spec": {"obs": {"low": (None,) * 17}}})
    with pytest.raises(CheckpointError, match=r"another spec/obs/low: .*\.\.\.\] \(17 entries\), where this run has .* \(11 entries\)"):
        check_meta({"spec": spec}, {"spec": spec | {"obs": {"low": [None] * 11}}})
    with pytest.raises(NewerFormatError, match="format 2, this offrl reads up to 1: install a newer offrl"):
        check_meta(meta | {"format": 2}, {})


def test_a_newer_format_is_refused_and_never_passed_over(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, example(), {})
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = checkpoints.save(2, example(), {})
    monkeypatch.undo()
    for read in (checkpoints.latest, lambda: load_file(path)):
        with pytest.raises(NewerFormatError, match="format 2"):
            read()


ODD = ["with space", "na\u00efve-\u6728", *([] if sys.platform == "darwin" else [b"not-utf8-\xff"])]


@pytest.mark.parametrize("name", ODD)
def test_any_path_will_do_and_can_be_printed(tmp_path, name):
    folder = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    for path in (folder, os.fsdecode(folder)):
        Checkpoints(path).save(1, example(1), {})
        assert same(Checkpoints(path).latest().tree, example(1))
        save_file(os.path.join(os.fsencode(path), b"policy"), example(1), {})
    with pytest.raises(CheckpointError) as error:
        load_file(os.path.join(folder, b"absent"))
    assert str(error.value).encode() and "No such file" in str(error.value)
