"""Adapters of decoders out to real PEFT and back in; two of them from disk in one batch."""

import json

import hypothesis.strategies as st
import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from hypothesis import given, settings
from safetensors.numpy import load_file, save_file

from lorax import LoraSpec, adapt, adapt_rows, init, merge, stack_adapters
from lorax.errors import LoraxError
from lorax.interop import load_peft, save_peft
from lorax.interop.peft_fused import cut, fuse
from lorax.lora.paths import leaf_path
from lorax.models import DECODERS, quantize
from tests.helpers.causal_zoo import load_lm, ragged, torch_logits, write_lm

pytestmark = pytest.mark.slow

LLAMAS = tuple(name for name in DECODERS if name != "gpt2")
OURS = {
    "qv": LoraSpec(4, 8),
    "unlike": LoraSpec(
        4,
        8,
        targets=("qkvo",),
        rank_pattern={"value": 2, "layers.1.attention.query": 3},
        alpha_pattern={"key": 5.5, "out": 32},
    ),
    "mlp": LoraSpec(3, 6, targets="mlp", layers=(1,)),
    "all-linear": LoraSpec(4, 8, "rslora", targets="all-linear"),
    "down": LoraSpec(2, targets="down"),
    "lm_head": LoraSpec(2, 6, targets=("lm_head", "q")),
}
# In PEFT's words, with what it writes as `target_modules` if that is another.
THEIRS = {
    "gpt2": {
        "c_attn": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]},
        "blocks": {
            "r": 3,
            "use_rslora": True,
            "target_modules": ["attn.c_proj", "c_attn", "c_fc"],
            "rank_pattern": {"h.1.attn.c_attn": 5},
            "alpha_pattern": {"c_fc": 2.5},
        },
        "c_proj": {"r": 2, "target_modules": ["c_proj"], "layers_to_transform": [0]},
        "positions": {"r": 2, "target_modules": ["wpe", "c_attn"]},
        "lm_head": {"r": 2, "target_modules": ["c_attn", "lm_head"]},
    },
    "llama": {
        "qv": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "blocks": {
            "r": 3,
            "use_rslora": True,
            "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "up_proj"],
            "rank_pattern": {"layers.1.mlp.gate_proj": 5},
            "alpha_pattern": {"k_proj": 2.5},
        },
        "words": {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
        "lm_head": {"r": 2, "target_modules": ["lm_head", "q_proj"]},
    },
}
CASES = [(name, case) for name in DECODERS for case in THEIRS.get(name, THEIRS["llama"])]


def base_of(model_type, folder, tied=False):
    """Writes a random decoder; ours, its parameters, and a maker of theirs."""
    write_lm(folder, model_type, tie_word_embeddings=tied)
    model = load_lm(folder)
    make = transformers.AutoModelForCausalLM.from_pretrained
    return model, nnx.to_pure_dict(nnx.state(model)), lambda: make(folder).eval()


def noisy(lora, seed=1):
    rng = np.random.default_rng(seed)
    # Factors of 0.3 would outweigh the base, and turn a last bit of it into 1e-5 of the logits.
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), lora)


def assert_same_logits(ours, theirs):
    ids, mask = ragged()
    with torch.no_grad():
        want = torch_logits(theirs.eval(), ids, mask).numpy()
    real = mask.astype(bool)
    np.testing.assert_allclose(ours(ids, mask)[real], want[real], rtol=0, atol=1e-5)


def written(folder):
    """(config, tensors) of an adapter on disk."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        np.testing.assert_array_equal(tensor, right[name], err_msg=name)


def peft_saved(make, folder, options, seed=3):
    """An adapter that PEFT made and saved, with random weights; and the torch model."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **options)
    model = peft.get_peft_model(make(), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", OURS)
@pytest.mark.parametrize("model_type", DECODERS)
def test_ours_to_peft_and_back(model_type, case, tmp_path):
    model, base, make = base_of(model_type, tmp_path / "base")
    spec, folder = OURS[case], tmp_path / "adapter"
    lora = noisy(init(jax.random.key(0), base, spec))
    save_peft(folder, lora, spec, model_type, str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(make(), folder)
    assert_same_logits(adapt(model, lora, spec), theirs)

    again = load_peft(folder, base, model_type)
    got, want = (merge(base, *pair) for pair in ((again.lora, again.spec), (lora, spec)))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=1e-6), got, want)
    if model_type != "gpt2":
        jax.tree.map(np.testing.assert_array_equal, again.lora, lora)
        assert {p: again.spec.scale(p) for p in lora} == {p: spec.scale(p) for p in lora}
    save_peft(tmp_path / "twice", again.lora, again.spec, model_type, str(tmp_path / "base"))
    first, second = written(folder), written(tmp_path / "twice")
    assert_same_tensors(first[1], second[1])
    fixed = ("r", "lora_alpha", "rank_pattern", "use_rslora", "fan_in_fan_out", "task_type")
    assert {k: first[0][k] for k in fixed} == {k: second[0][k] for k in fixed}


@pytest.mark.parametrize(("model_type", "case"), CASES)
def test_peft_to_ours_and_back(model_type, case, tmp_path):
    model, base, make = base_of(model_type, tmp_path / "base")
    options = THEIRS.get(model_type, THEIRS["llama"])[case]
    theirs = peft_saved(make, tmp_path / "adapter", options)
    lora, spec, head = load_peft(tmp_path / "adapter", base, model_type)
    assert head is None
    assert_same_logits(adapt(model, lora, spec), theirs)

    save_peft(tmp_path / "back", lora, spec, model_type, str(tmp_path / "base"), is_tied=False)
    (config, tensors), (back, again) = written(tmp_path / "adapter"), written(tmp_path / "back")
    assert_same_tensors({n: t for n, t in tensors.items() if "lora_" in n}, again)
    for option in ("r", "lora_alpha", "use_rslora", "fan_in_fan_out", "task_type", "bias"):
        assert back[option] == config[option], option
    if not options.get("layers_to_transform"):
        assert sorted(back["target_modules"]) == sorted(config["target_modules"])
    assert_same_logits(
        adapt(model, lora, spec), peft.PeftModel.from_pretrained(make(), tmp_path / "back")
    )


def test_c_attn_is_read_as_three_that_share_a(tmp_path):
    _, base, make = base_of("gpt2", tmp_path / "base")
    peft_saved(make, tmp_path / "adapter", {"r": 4, "target_modules": ["c_attn"]})
    lora, spec, _ = load_peft(tmp_path / "adapter", base, "gpt2")
    _, tensors = written(tmp_path / "adapter")
    for layer in (0, 1):
        name = f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_"
        for n, part in enumerate(("query", "key", "value")):
            pair = lora.pop(f"decoder.layers.{layer}.attention.{part}.kernel")
            np.testing.assert_array_equal(pair["a"], tensors[f"{name}A.weight"])
            rows = slice(24 * n, 24 * (n + 1))
            np.testing.assert_array_equal(pair["b"], tensors[f"{name}B.weight"][rows])
    assert lora == {}
    assert set(spec.targets) == {"attention.query", "attention.key", "attention.value"}


def test_q_and_v_are_written_as_blocks_of_c_attn(tmp_path):
    _, base, _ = base_of("gpt2", tmp_path / "base")
    spec = LoraSpec(4, 8, rank_pattern={"value": 2})  # scales 2 and 4
    lora = noisy(init(jax.random.key(0), base, spec))
    save_peft(tmp_path / "adapter", lora, spec, "gpt2", "hub/base")
    config, tensors = written(tmp_path / "adapter")
    expected = {
        "r": 6,
        "lora_alpha": 12,
        "target_modules": ["c_attn"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": True,
        "task_type": "CAUSAL_LM",
    }
    assert {option: config[option] for option in expected} == expected
    q, v = (lora[f"decoder.layers.0.attention.{n}.kernel"] for n in ("query", "value"))
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    np.testing.assert_array_equal(tensors[f"{name}A.weight"], np.concatenate([q["a"], v["a"]]))
    want = np.zeros((72, 6), np.float32)
    want[:24, :4], want[48:, 4:] = q["b"], 2 * v["b"]
    np.testing.assert_array_equal(tensors[f"{name}B.weight"], want)


@settings(deadline=None, derandomize=True)
@given(
    ranks=st.dictionaries(st.integers(0, 2), st.integers(1, 4), min_size=1),
    shared=st.booleans(),
)
def test_a_fused_update_is_that_of_its_parts(ranks, shared):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 5)).astype(np.float32)
    pairs = {
        n: (rows[:r] if shared else rng.normal(size=(r, 5)), rng.normal(size=(6, r)))
        for n, r in ranks.items()
    }
    a, b = fuse(pairs, 3)
    assert len(a) == (sum(set(ranks.values())) if shared else sum(ranks.values()))
    for n in range(3):
        own_a, own_b = cut((a, b), n, 3)
        want = pairs[n][1] @ pairs[n][0] if n in pairs else np.zeros((6, 5))
        np.testing.assert_allclose(own_b @ own_a, want, rtol=0, atol=1e-5)


def test_factors_that_are_not_numbers_are_fused_as_they_are():
    bad = np.full((1, 2), np.nan)
    a, b = fuse({0: (bad, np.ones((3, 1))), 2: (bad.copy(), np.ones((3, 1)))}, 3)
    np.testing.assert_array_equal(a, bad)
    assert b[:, 0].tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_adapter_is_read_for_a_base_in_few_bits(saved, kind):
    root, base, _ = saved
    some = ["attention.query.kernel", "mlp.up.kernel"]  # one part of c_attn among them

    def few_bits(path, leaf):
        return quantize(leaf, kind) if leaf_path(path).endswith(tuple(some)) else leaf

    small = jax.tree_util.tree_map_with_path(few_bits, base)
    got, want = (load_peft(root / "adapter", x, "gpt2") for x in (small, base))
    jax.tree.map(np.testing.assert_array_equal, got.lora, want.lora)
    assert got.spec == want.spec


def test_a_base_without_a_part_of_c_attn_is_refused(saved):
    root, base, _ = saved
    base = jax.tree.map(lambda leaf: leaf, base)  # new dicts
    del base["decoder"]["layers"][1]["attention"]["value"]["kernel"]
    message = r"transformer\.h\.1\.attn\.c_attn is 3 kernels here, but the base has 2 of them"
    with pytest.raises(LoraxError, match=message):
        load_peft(root / "adapter", base, "gpt2")


def test_two_adapters_of_peft_in_one_batch(tmp_path):
    model, base, make = base_of("gpt2", tmp_path / "base")
    options = [THEIRS["gpt2"][case] for case in ("c_attn", "blocks")]
    theirs = [peft_saved(make, tmp_path / f"{n}", o, seed=n) for n, o in enumerate(options)]
    found = [load_peft(tmp_path / f"{n}", base, "gpt2") for n in range(2)]
    pool = stack_adapters([(adapter.lora, adapter.spec) for adapter in found])
    ids, mask = ragged()
    rows = [1, 0, -1, 1]
    got = adapt_rows(model, pool, rows)(ids, mask)
    with torch.no_grad():
        each = [torch_logits(one, ids, mask).numpy() for one in (*theirs, make())]
    for row, n in enumerate(rows):
        real = mask[row].astype(bool)
        np.testing.assert_allclose(got[row][real], each[n][row][real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_bare_decoder_s_adapter(model_type, tmp_path):
    model, base, _ = base_of(model_type, tmp_path / "base")
    bare = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    target = "c_attn" if model_type == "gpt2" else "q_proj"
    config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    theirs = peft.get_peft_model(bare, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    lora, spec, _ = load_peft(tmp_path / "adapter", base, model_type)
    ids, mask = ragged()
    with torch.no_grad():
        tensors = [torch.from_numpy(x).long() for x in (ids, mask)]
        want = theirs(input_ids=tensors[0], attention_mask=tensors[1]).last_hidden_state.numpy()
    real = mask.astype(bool)
    got = adapt(model, lora, spec).decoder(ids, mask)
    np.testing.assert_allclose(got[real], want[real], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A GPT-2 with tied embeddings, and an adapter of PEFT on it."""
    root = tmp_path_factory.mktemp("decoder")
    _, base, make = base_of("gpt2", root / "base", tied=True)
    peft_saved(make, root / "adapter", {"r": 2, "target_modules": ["c_attn"]})
    return root, base, make


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora=True is not served"),
        ({"bias": "lora_only"}, "bias='lora_only' is not served"),
        ({"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS' is not served"),
        ({"lora_bias": True}, "lora_bias=True is not served"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=[1] is not served"),
        ({"target_modules": ["c_attn", "wte"]}, "transformer.wte is adapted as embeddings alone"),
        ({"target_modules": ["c_fc"]}, "missing base_model.model.transformer.h.0.mlp.c_fc.lora_A"),
        ({"r": 3}, "c_attn.lora_B.weight has shape (72, 2), expected (72, 3)"),
    ],
)
def test_configs_that_are_refused(saved, tmp_path, changes, said):
    root, base, _ = saved
    config, tensors = written(root / "adapter")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoraxError) as error:
        load_peft(tmp_path, base, "gpt2")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_are_refused(saved, tmp_path):
    root, base, make = saved
    peft_saved(make, tmp_path / "head", {"r": 2, "target_modules": ["c_attn", "lm_head"]})
    with pytest.raises(LoraxError, match=r"unexpected base_model\.model\.lm_head\.lora_A"):
        load_peft(tmp_path / "head", base, "gpt2")
    spec = LoraSpec(2, targets=r"decoder\.word")
    lora = init(jax.random.key(0), base, spec)
    with pytest.raises(LoraxError, match=r"'decoder\.word\.embedding' is the output layer, too"):
        save_peft(tmp_path / "words", lora, spec, "gpt2", str(root / "base"))
