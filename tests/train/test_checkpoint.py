import jax.numpy as jnp
import numpy as np
import pytest

from lorax import LoraSpec
from lorax.errors import LoraxError
from lorax.runs.adapter import load_adapter, lora_tree, save_adapter
from lorax.runs.checkpoints import Checkpoints
from lorax.runs.files import write_json
from lorax.runs.trial_id import trial_dir
from lorax.train import run_trial, spec_of


@pytest.fixture(scope="session")
def world(deep_world):
    return deep_world


def tree():
    rng = np.random.default_rng(0)
    draw = rng.normal(size=(3, 5)).astype(np.float32)
    return {
        "half": {"odd.name": jnp.asarray(draw, jnp.bfloat16)},
        "single": [jnp.asarray(draw), None, {"deep": jnp.asarray(-draw)}],
        "count": jnp.int32(7),
        "key": jnp.array([3, 2**32 - 1], jnp.uint32),
        "none": None,
    }


def assert_same(got, expected):
    import jax

    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def open_checkpoints(tmp_path):
    opened = []

    def open_one():
        opened.append(Checkpoints(tmp_path / "checkpoints"))
        return opened[-1]

    yield open_one
    for checkpoints in opened:
        checkpoints.close()


def test_every_leaf_comes_back_bit_for_bit(open_checkpoints):
    progress = {"step": 4, "best": {"metrics": {"f1": 1 / 3}}, "reason": None}
    open_checkpoints().save(4, tree(), progress)
    state, restored = open_checkpoints().restore(tree())
    assert_same(state, tree())
    assert restored == progress


def test_there_is_none_at_first(open_checkpoints):
    assert open_checkpoints().restore(tree()) is None


def test_the_newest_of_the_two_kept_is_restored(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    for step in (2, 10, 9 + 2, 100):  # neither in the order of names
        checkpoints.save(step, {"x": jnp.full(3, step)}, {"step": step})
    state, progress = checkpoints.restore({"x": jnp.zeros(3, jnp.int32)})
    assert progress == {"step": 100} and state["x"].tolist() == [100, 100, 100]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["100", "11"]


def test_a_step_may_be_written_again(open_checkpoints):
    checkpoints = open_checkpoints()
    checkpoints.save(3, {"x": jnp.zeros(2)}, {"step": 3})
    checkpoints.save(3, {"x": jnp.ones(2)}, {"step": 3})
    state, _ = checkpoints.restore({"x": jnp.zeros(2)})
    assert state["x"].tolist() == [1, 1]


def test_another_shape_is_not_loaded(open_checkpoints, caplog):
    open_checkpoints().save(3, {"x": jnp.zeros(2)}, {})
    assert open_checkpoints().restore({"x": jnp.zeros(3)}) is None
    assert "set aside" in caplog.text


def trained():
    pair = {"a": jnp.ones((2, 8)), "b": jnp.full((4, 2), 0.5)}
    base = {"head": {"bias": jnp.arange(2.0)}, "frozen": None}
    return {"lora": {"enc.0.q.kernel": pair}, "base": base}


def test_an_adapter_comes_back_with_its_spec(tmp_path):
    spec = LoraSpec(
        rank=2, alpha=7.5, scaling="rslora", targets=("q", "mlp"), layers=(0, 2), dropout=0.1,
        rank_pattern={"key": 4, "value": 1}, alpha_pattern={"key": 3.0}, modules_to_save=("head",),
        kernel_axes={"out": "iio"},
    )  # fmt: skip
    size = save_adapter(tmp_path / "adapter", trained(), spec, {"base": {"source": "somewhere"}})
    flat, loaded, about = load_adapter(tmp_path / "adapter")
    assert loaded == spec and hash(loaded) == hash(spec)
    assert about == {"base": {"source": "somewhere"}}
    assert_same(lora_tree(flat), trained()["lora"])
    assert flat["base.head.bias"].tolist() == [0, 1]
    files = [file for file in (tmp_path / "adapter").rglob("*") if file.is_file()]
    assert size == sum(len(file.read_bytes()) for file in files)


def test_without_an_adapter_there_is_no_spec(tmp_path):
    save_adapter(tmp_path / "head", {"base": trained()["base"]}, None, {})
    flat, spec, _ = load_adapter(tmp_path / "head")
    assert list(flat) == ["base.head.bias"] and spec is None


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_what_is_no_adapter_is_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "adapter"
    if damage == "empty":
        path.mkdir()
    if damage == "cut":
        save_adapter(path, trained(), LoraSpec(), {})
        for file in path.rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(LoraxError, match="adapter: not a readable adapter") as fault:
        load_adapter(path)
    assert "\n" not in str(fault.value)


def test_a_trials_adapter_holds_nothing_of_the_base(world, tmp_path):
    lora = {"rank": 2, "alpha": 5.0, "alpha_pattern": {"layers.1.attention.query": 3.0}}
    config = world.trial(tmp_path, lora=lora)
    result = run_trial(config)
    flat, spec, about = load_adapter(trial_dir(config) / "adapter")
    assert spec == spec_of(config.lora)
    assert sum(leaf.nbytes for leaf in flat.values()) == 4 * result["trainable_params"]
    assert result["adapter_bytes"] < result["base_bytes"] / 5
    assert about["base"]["source"] == str(world.source)
    assert about["best"] == result["best"]


def test_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n "a": 1\n}\n'
