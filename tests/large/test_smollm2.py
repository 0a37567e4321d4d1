"""SmolLM2 out of its GGUF file: its weights, tokens and words are those of transformers."""

import gguf
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from scipy.special import log_softmax

from lorax.config import ModelConfig
from lorax.data import load_tokenizer
from lorax.errors import LoraxError
from lorax.generation import GenerationConfig, generate
from lorax.models import load_causal_lm, resolve_source
from tests.helpers.gguf_zoo import plain_bpe

SOURCE, GGUF = "assets/smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PLAIN = """\
Rain begins high above the ground. The sun warms the water in seas, lakes and rivers, and some of
that water rises into the air as a gas that we cannot see, called water vapor. As the air rises it
becomes colder, and cold air cannot hold as much vapor as warm air. The vapor then turns back into
very small drops of water, which form around tiny pieces of dust. Millions of these drops together
make a cloud. At first the drops are so light that they float. When they bump into each other they
join and grow, and when they are heavy enough they fall to the ground as rain. If the air is below
the freezing point, the water falls as snow or as ice instead. Some of the rain flows over the land
into streams and rivers, which carry it back to the sea. Some of it sinks into the soil, where the
roots of plants can reach it, or goes deeper and fills the spaces between rocks. People dig wells
to bring this water to the surface. Plants give part of the water that they drink back to the air
through their leaves. In this way the same water is used again and again. Scientists call this the
water cycle. It has no beginning and no end, and it is the reason why there is fresh water on land
at all, even though most of the water on our planet is too salty to drink."""
TEXTS = [
    PLAIN,
    "It's 1984, and they've sold 1,234,567 copies at $3.14 each; that's 42%!",
    "def mean(xs: list[float]):\n\treturn sum(xs) / len(xs)  # naïve\n\n\nprint(mean([1, 22]))\n",
    "Größe, café, Ελληνικά, русский, 日本語, العربية, हिन्दी, 👩‍🔬🚀",
    "½ cup, x² + y³ (1 or 2)",
    " leading, trailing and   many   blanks \r\n\t \n",
    "",
]
# Blanks before a digit stay apart from it, by tokenizer.ggml.pre, which transformers passes over.
BEFORE_DIGITS = ["a   12\n  34\t\t5", "Ⅷ and Ⅸ, ٣٤٥"]
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
]


@pytest.fixture(scope="module")
def folder():
    try:
        return resolve_source(SOURCE)
    except LoraxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The GGUF file without what was made of it, which transformers would read instead."""
    place = tmp_path_factory.mktemp("alone")
    (place / GGUF).symlink_to((folder / GGUF).resolve())
    return place


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return load_causal_lm(ModelConfig(source=str(folder)))


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def logits(ours, theirs, tokenizer):
    """(T,) ids of the plain text, and our and their logits of it, (T, V) each."""
    torch = pytest.importorskip("torch")
    ids = np.asarray(tokenizer.encode(PLAIN).ids, np.int32)
    with torch.no_grad():
        want = theirs(torch.tensor(ids[None]).long()).logits[0].numpy()
    graphdef, state = nnx.split(ours)
    forward = jax.jit(lambda state, *arrays: nnx.merge(graphdef, state)(*arrays))
    got = forward(state, ids[None], np.ones((1, len(ids)), np.int32))[0]
    return ids, np.asarray(got), want


def perplexity(ids, logits_TxV):
    """Of each token but the first, given those before it."""
    log_probs_TxV = log_softmax(logits_TxV[:-1].astype(np.float64), axis=-1)
    return np.exp(-np.take_along_axis(log_probs_TxV, ids[1:, None], 1).mean())


def test_weights_are_those_that_transformers_reads(folder, alone):
    transformers = pytest.importorskip("transformers")
    read = transformers.AutoModelForCausalLM.from_pretrained(alone, gguf_file=GGUF)
    want = read.state_dict()
    got = load_file(folder / "model.safetensors")
    assert want.keys() - got.keys() == {"lm_head.weight"}  # the embeddings
    for name, array in got.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, want[name].numpy())


def test_logits_equal_transformers(logits):
    _, got, want = logits
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_perplexity_on_plain_english(logits):
    ids, got, want = logits
    assert perplexity(ids, got) == pytest.approx(perplexity(ids, want), rel=1e-5)
    assert perplexity(ids, got) == pytest.approx(10.70, abs=0.01)


def test_the_capital_of_france(ours, tokenizer):
    [made] = generate(ours, PROMPTS[:1], GenerationConfig(max_new_tokens=1), tokenizer=tokenizer)
    assert made.text == " Paris"


def test_greedy_continuations_equal_transformers(ours, theirs, tokenizer):
    torch = pytest.importorskip("torch")
    made = generate(
        ours, PROMPTS, GenerationConfig(max_new_tokens=24, eos_token_id=2), tokenizer=tokenizer
    )
    for prompt, completion in zip(PROMPTS, made, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        mask = torch.ones_like(ids)
        options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": 2}
        want = theirs.generate(ids, attention_mask=mask, **options)[0, ids.shape[1] :]
        assert completion.ids == want.tolist()


def test_tokens_follow_the_definition(folder, tokenizer):
    fields = gguf.GGUFReader(folder / GGUF).fields
    tokens, merges = (fields[f"tokenizer.ggml.{n}"].contents() for n in ("tokens", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for text in [*TEXTS, *BEFORE_DIGITS]:
        ids = tokenizer.encode(text).ids
        assert ids == plain_bpe(text, tokens, pairs)
        assert tokenizer.decode(ids) == text


def test_tokens_equal_transformers(folder, alone, tokenizer):
    transformers = pytest.importorskip("transformers")
    written = transformers.AutoTokenizer.from_pretrained(folder)
    read = transformers.AutoTokenizer.from_pretrained(alone, gguf_file=GGUF)
    chat = written.apply_chat_template([{"role": "user", "content": "Hi 12"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert chat.endswith("<|im_start|>user\nHi 12<|im_end|>\n")
    for text in [*TEXTS, chat]:
        ids = tokenizer.encode(text).ids
        assert ids == written(text).input_ids == read(text).input_ids
    assert (written.bos_token_id, written.eos_token_id, written.pad_token_id) == (1, 2, 2)
