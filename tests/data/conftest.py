import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
EOS = {"__type": "AddedToken", "content": "</s>", "special": True}  # as Hugging Face writes it
CORPUS = [
    "The quick brown fox says: what is it? It is what it is.\n\n",
    "Na\u00efve caf\u00e9s, d\u00e9j\u00e0 vu.",
    "user assistant system \u4e2d\u6587\u4e2d\u6587 \U0001f600\U0001f600\U0001f601",
    "    def f(x):\n    return x\n",
]


def train_bpe(*, bos=False, trim_offsets=False):
    """A byte-level BPE with merges of letters, blanks and of parts of letters."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    made.train_from_iterator(CORPUS * 3, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    made.post_processor = processors.Sequence(steps)
    return made


@pytest.fixture(scope="session")
def bpe():
    return train_bpe()


@pytest.fixture(scope="session")
def bpe_bos():
    return train_bpe(bos=True)


@pytest.fixture(scope="session")
def bpe_trimmed():
    return train_bpe(trim_offsets=True)


@pytest.fixture
def base(tmp_path, bpe_bos):
    """A decoder's folder: the tokenizer and the names of its special tokens."""
    folder = tmp_path / "base"
    folder.mkdir()
    bpe_bos.save(str(folder / "tokenizer.json"))
    config: dict = {"bos_token": "<s>", "eos_token": EOS}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
