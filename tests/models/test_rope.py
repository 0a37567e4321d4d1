"""Rotary positions of every kind against transformers, and what a sequence's length changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.errors import LoraxError
from lorax.models.families.llama import LlamaConfig
from lorax.models.layers.rope import Rope, dynamic
from tests.helpers.causal_zoo import (
    LLAMA,
    SIDES,
    both_sides,
    load_lm,
    ragged,
    torch_logits,
    write_lm,
)
from tests.helpers.run_model import run

pytestmark = pytest.mark.slow

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}
# Heads of 3 frequencies, made for 5 tokens, so that rows of 9 and 7 tokens of `ragged` are long.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "original_max_position_embeddings": 5,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 3.0, 7.0],
}
FACTORS = {"short_factor": 2.0, "long_factor": 30.0}
BY_LENGTH = [
    {"rope_parameters": DYNAMIC, "max_position_embeddings": 5},
    {"rope_parameters": LONGROPE},
    {"rope_parameters": LONGROPE | {"factor": 3.0}},
    {"rope_parameters": LONGROPE | {"attention_factor": 1.4}},
]


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3])
def test_logits_equal_transformers(tmp_path, rope):
    model = write_lm(tmp_path, rope_parameters=rope)
    ids, mask = both_sides()
    want = torch_logits(model, ids, mask).detach().numpy()
    real = mask.astype(bool)
    np.testing.assert_allclose(
        run(load_lm(tmp_path), ids, mask)[real], want[real], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("options", BY_LENGTH)
def test_each_row_turns_by_its_own_length(tmp_path, options, side):
    write_lm(tmp_path, **options)
    ids, mask = ragged(side)
    got, real = run(load_lm(tmp_path), ids, mask), mask.astype(bool)
    for row in range(len(ids)):
        # Another model each time, as theirs remembers the longest sequence that it has seen.
        theirs = write_lm(tmp_path, **options)
        alone = ids[row, real[row]][None]
        want = torch_logits(theirs, alone, np.ones_like(alone)).detach().numpy()[0]
        np.testing.assert_allclose(got[row, real[row]], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", BY_LENGTH)
def test_sequences_of_one_row_turn_by_their_own_lengths(tmp_path, options):
    write_lm(tmp_path, **options)
    model, (ids, mask) = load_lm(tmp_path), ragged(lengths=(9, 4, 7))
    want, real = run(model, ids, mask), mask.astype(bool)
    numbers, positions = np.arange(1, 4)[:, None] * mask, np.cumsum(mask, 1) - 1
    ids, numbers, positions = (x[real][None] for x in (ids, numbers, positions))
    got = run(model, ids, numbers, position_ids_BxT=positions)
    np.testing.assert_allclose(got[0], want[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("options", BY_LENGTH[:2])
def test_generation_equals_transformers_across_the_length(tmp_path, options, beams):
    from lorax.generation import GenerationConfig, generate
    from tests.helpers.generation import ids_of, prompts_of, reference

    write_lm(tmp_path, **options)
    prompts = prompts_of(*ragged("left", lengths=(3, 7, 2)))
    model, new = load_lm(tmp_path), 12
    made = generate(model, prompts, GenerationConfig(max_new_tokens=new, num_beams=beams))
    for ids, prompt in zip(ids_of(made), prompts, strict=True):
        theirs = write_lm(tmp_path, **options)
        alone = prompt[None], np.ones((1, len(prompt)), np.int32)
        assert [ids] == reference(theirs, *alone, new=new, num_beams=beams)[0]


def test_models_reach_as_far_as_they_are_stretched():
    def reach(**given):
        return LlamaConfig.from_hf({"model_type": "llama", **LLAMA, **given}).max_length

    assert reach() == 64
    assert reach(rope_scaling={"type": "dynamic", "factor": 2.0}) == 128
    assert reach(rope_scaling={"type": "linear", "factor": 2.5}) == 64
    assert reach(rope_parameters=LLAMA3) == 64
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert reach(rope_parameters=yarn) == 256
    assert reach(rope_parameters=yarn, max_position_embeddings=512) == 512
    assert reach(rope_parameters=LONGROPE) == 64


@pytest.mark.parametrize(
    ("named", "rope"),
    [
        ("rope_type='proportional'", {"rope_type": "proportional"}),
        ("without short_factor, long_factor", {"rope_type": "longrope", "factor": 2.0}),
        ("long_factor has 2 numbers for the 3 ", LONGROPE | {"long_factor": [1.0, 2.0]}),
        ("short_factor has 0 numbers", LONGROPE | {"short_factor": []}),
        ("long_factor=2.0 is not a list", LONGROPE | {"long_factor": 2.0}),
        (r"short_factor=\[1, 0, 2\] is not", LONGROPE | {"short_factor": [1, 0, 2]}),
        (r"factor=\[2.0\] is not a positive", {"rope_type": "linear", "factor": [2.0]}),
        ("factor=inf is not a positive", {"rope_type": "dynamic", "factor": float("inf")}),
        ("attention_factor='1' is not", LONGROPE | {"attention_factor": "1"}),
        ("without factor", {"type": "dynamic"}),
        ("without factor", {"type": "linear"}),
        ("without factor", {"rope_type": "yarn"}),
        ("one for each kind of layer", {"full_attention": {"rope_type": "default"}}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ],
)
def test_what_is_not_served_is_refused_by_name(named, rope):
    with pytest.raises(LoraxError, match=named):
        LlamaConfig.from_hf({"model_type": "llama", **LLAMA, "rope_parameters": rope})


@pytest.mark.parametrize(
    ("kind", "longest"),
    [
        *((kind, 16384) for kind in ("default", "linear", "llama3", "yarn", "longrope")),
        ("dynamic", 4096),  # XLA's powers, 3e-7 off, are angles of 1e-3 at the end of 16,384
    ],
)
def test_long_positions_equal_transformers(tmp_path, kind, longest):
    rope = LLAMA3 | {"rope_type": kind, "original_max_position_embeddings": 2048}
    rope |= {name: list(np.linspace(1, most, 32)) for name, most in FACTORS.items()}
    made_for = 1024 if kind == "dynamic" else longest
    options = {"head_dim": 64, "max_position_embeddings": made_for, "rope_parameters": rope}
    model = write_lm(tmp_path, "llama", **options)
    ids, mask = ragged(lengths=(400,))
    positions = np.sort(np.random.default_rng(0).choice(longest, (1, 400), replace=False))
    want = torch_logits(model, ids, mask, positions).detach().numpy()
    got = run(load_lm(tmp_path), ids, mask, position_ids_BxT=positions.astype(np.int32))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_frequencies_equal_transformers(model_type):
    modeling = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    rope = LLAMA3 | {"original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(**LLAMA | {"head_dim": 128, "rope_parameters": rope})
    want, scale = modeling.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert scale == 1
    got = Rope.from_hf({"rope_parameters": rope, "model_type": model_type}).frequencies(128)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want.numpy(), rtol=3e-7)


@pytest.mark.parametrize("length", [100, 2049, 5000, 16384])
def test_dynamic_frequencies_equal_transformers(length):
    modeling = pytest.importorskip("transformers.modeling_rope_utils")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    rope = {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 8.0}
    given = {"max_position_embeddings": 2048, "rope_parameters": rope}
    config = transformers.LlamaConfig(**LLAMA | {"head_dim": 128} | given)
    init = modeling.ROPE_INIT_FUNCTIONS["dynamic"]
    want, _ = init(config, "cpu", seq_len=torch.tensor(length))
    got = dynamic(Rope.from_hf(given), 128, jnp.full((1, 1), length))
    np.testing.assert_allclose(got[0], want.numpy(), rtol=5e-7)  # four last bits: a power's


def test_dynamic_changes_nothing_up_to_the_length_it_was_made_for():
    def cosines(rope):
        return jax.jit(lambda x: rope.rotation(x, 128)[0])(jnp.arange(4096)[None])

    given = {"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 8.0}}
    np.testing.assert_array_equal(cosines(Rope.from_hf(given)), cosines(Rope()))


@pytest.mark.parametrize("length", [64, 4096])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_factor": 1.3},
        {"mscale": 0.7, "mscale_all_dim": 1.2},
        {"beta_fast": 16.0, "beta_slow": 2.0},
        {"truncate": False},
        {"beta_fast": 1.0, "beta_slow": 1.0},
        {"factor": 0.5},
    ],
)
def test_yarn_equals_transformers(options, length):
    modeling = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, **options}
    rope["original_max_position_embeddings"] = length
    config = transformers.LlamaConfig(**LLAMA | {"head_dim": 128, "rope_parameters": rope})
    want, scale = modeling.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = Rope.from_hf({"rope_parameters": rope})
    assert ours.scale == pytest.approx(scale, rel=1e-12)
    np.testing.assert_allclose(ours.frequencies(128), want.numpy(), rtol=3e-7)


def test_old_names_of_rotary_options_are_read():
    old = {k: v for k, v in LLAMA3.items() if k not in ("rope_type", "rope_theta")}
    for name in ("rope_type", "type"):
        given = {"rope_theta": 5e5, "rope_scaling": old | {name: "llama3"}}
        assert Rope.from_hf(given) == Rope.from_hf({"rope_parameters": LLAMA3})
    name = "original_max_position_embeddings"
    old = {k: v for k, v in LONGROPE.items() if k not in ("rope_type", "rope_theta", name)}
    given = {name: 5, "rope_theta": 100, "rope_scaling": old | {"type": "longrope"}}
    assert Rope.from_hf(given) == Rope.from_hf({"rope_parameters": LONGROPE})
    with pytest.raises(LoraxError, match="rope_scaling='linear' is not a dict"):
        Rope.from_hf({"rope_scaling": "linear"})
    with pytest.raises(LoraxError, match="rope_theta='1e4' is not a positive number"):
        Rope.from_hf({"rope_theta": "1e4"})
    assert Rope.from_hf({"rope_scaling": None, "rope_theta": 1e6}) == Rope(theta=1e6)
    assert Rope.from_hf({}) == Rope()
