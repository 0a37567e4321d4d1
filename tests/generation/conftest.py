import jax
import pytest

from tests.helpers.causal_zoo import load_lm, write_lm


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """By model type: the model of transformers, and ours of the same weights.

    Its texts wander, and no last bit decides which word is the most probable.
    """
    made = {}

    def make(model_type):
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            theirs = write_lm(folder, model_type, tie_word_embeddings=False)
            theirs.get_output_embeddings().weight.data *= 2.5
            if model_type == "gpt2":
                theirs.transformer.wpe.weight.data *= 3
            theirs.save_pretrained(folder)
            made[model_type] = theirs, load_lm(folder)
        return made[model_type]

    return make
