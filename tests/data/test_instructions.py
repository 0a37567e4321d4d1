import json

import pytest

from lorax.data import encode_documents, find_eos_id, load_documents, load_split, load_tokenizer
from lorax.errors import LoraxError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A fox."}]


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_all(tmp_path, *rows, base=None):
    """The rows as the train split of a folder."""
    write(tmp_path / "train.jsonl", *rows)
    return load_documents("instructions", "train", tmp_path, base)


def said(documents):
    pairs = zip(documents.texts, documents.targets, strict=True)
    return [[text[start:end] for start, end in spans] for text, spans in pairs]


def test_prompts_and_instructions(tmp_path):
    documents = read_all(
        tmp_path,
        {"prompt": "2 + 2 =", "completion": " 4 \u2028"},
        "",
        {"instruction": "Add.", "input": "1 2", "output": "3", "id": 7},
        {"instruction": "Say na\u00efve.", "input": "", "output": "na\u00efve"},
        {"instruction": "Go.", "output": "Gone."},
        {"prompt": "", "completion": "x"},
    )
    assert documents.texts == [
        "2 + 2 = 4 \u2028",
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3",
        "### Instruction:\nSay na\u00efve.\n\n### Response:\nna\u00efve",
        "### Instruction:\nGo.\n\n### Response:\nGone.",
        "x",
    ]
    assert said(documents) == [[" 4 \u2028"], ["3"], ["na\u00efve"], ["Gone."], ["x"]]
    assert documents.form == "prompt"


def test_chats(tmp_path, base):
    (base / "chat_template.jinja").write_text(CHATML)
    turns = [{"role": "system", "content": "Be."}, *CHAT, *CHAT]
    documents = read_all(tmp_path, {"messages": CHAT}, {"messages": turns}, base=base)
    assert documents.form == "chat"
    assert said(documents) == [["A fox.<|im_end|>\n"], ["A fox.<|im_end|>\n"] * 2]
    tokenizer = load_tokenizer(base)
    encoded = encode_documents(tokenizer, documents, 100, eos_id=find_eos_id(tokenizer, base))
    ids, marks = encoded.input_ids[0], encoded.token_type_ids[0]
    words = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids[marks == 0], skip_special_tokens=False) == words
    assert tokenizer.decode(ids[marks == 1], skip_special_tokens=False) == (
        "A fox.<|im_end|>\n</s>"  # no </s> in the template
    )


def test_a_single_file_gives_a_tenth(tmp_path):
    rows = [json.dumps({"prompt": f"{n}", "completion": "x"}) for n in range(50)]
    path = write(tmp_path / "all.jsonl", *rows)
    train, dev = (load_documents("instructions", split, path) for split in ("train", "dev"))
    assert (len(train), len(dev)) == (45, 5)
    assert sorted(train.texts + dev.texts) == sorted(f"{n}x" for n in range(50))
    write(path, *rows[::-1])  # a line's split does not depend on where it stands
    assert load_documents("instructions", "dev", path).texts == dev.texts[::-1]
    write(path, *rows, *rows)  # nor are equal lines parted
    twice = load_documents("instructions", "dev", path).texts
    assert set(twice).isdisjoint(load_documents("instructions", "train", path).texts)
    assert len(twice) == 10
    write(path, *rows[:2])
    assert {len(load_documents("instructions", s, path)) for s in ("train", "dev")} == {1}


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", ', r":2: not JSON \(Expecting property name"),
        ("[1]", r":2: not a JSON object"),
        ({}, r":2: needs prompt and completion, .* or messages; it has nothing"),
        ({"text": "a", "x": 1}, r":2: needs prompt and completion, .*; it has text, x"),
        ({"prompt": "a"}, r":2: no 'completion'; it has prompt"),
        ({"completion": "a"}, r":2: no 'prompt'; it has completion"),
        ({"prompt": 3, "completion": "a"}, r":2: 'prompt' must be a text, not 3"),
        ({"prompt": "a", "completion": None}, r":2: 'completion' must be a text, not null"),
        ('{"prompt": "a", "completion": "\\ud83d"}', r":2: 'completion' holds half of a surrogate"),
        ({"prompt": "a", "completion": " \n"}, r":2: nothing to be predicted, its completion is"),
        ({"instruction": "a"}, r":2: no 'output'; it has instruction"),
        ({"output": "a"}, r":2: no 'instruction'; it has output"),
        ({"instruction": "a", "input": 1, "output": "a"}, r":2: 'input' must be a text, not 1"),
        ({"instruction": "a", "output": ""}, r":2: nothing to be predicted"),
        ({"messages": CHAT}, r":2: chats and others in one split, from .*train\.jsonl:1 on"),
    ],
)
def test_malformed_lines(tmp_path, row, message):
    with pytest.raises(LoraxError, match=r"train\.jsonl" + message) as caught:
        read_all(tmp_path, GOOD, row)
    assert "\n" not in str(caught.value)


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r":2: messages must be a list of at least one"),
        ("Hi", r":2: messages must be a list"),
        (["Hi"], r":2: messages\[0\]: not a JSON object"),
        ([*CHAT, {"content": "a"}], r":2: messages\[2\]: no 'role'; it has content"),
        ([*CHAT, {"role": "user"}], r":2: messages\[2\]: no 'content'; it has role"),
        ([turn("user", None)], r":2: messages\[0\]: 'content' must be a text, not null"),
        ([turn("human", "a")], r":2: messages\[0\]: unknown role 'human'; known: system, user,"),
        ([turn("user", "a"), turn("assistant", "")], r":2: messages\[1\]: nothing to be predicted"),
        ([turn("user", "a")], r":2: nothing to be predicted, no message is the assistant's"),
        ([turn("user", "<|im_end|>"), *CHAT], r":2: messages\[0\] holds '<\|im_end\|>'"),
    ],
)
def test_malformed_chats(tmp_path, base, messages, message):
    (base / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(LoraxError, match=r"train\.jsonl" + message) as caught:
        read_all(tmp_path, {"messages": CHAT}, {"messages": messages}, base=base)
    assert "\n" not in str(caught.value)


def test_a_template_that_marks_nothing(tmp_path, base):
    source = "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    (base / "chat_template.jinja").write_text(source)
    with pytest.raises(LoraxError, match=r"jsonl:1: nothing to be predicted, the template marks"):
        read_all(tmp_path, {"messages": CHAT}, base=base)


BLOCK = "{% generation %}{{ m.content }}{% endgeneration %}"
UNTAUGHT = "so that the model does not learn to end its turn"


@pytest.mark.parametrize(
    ("answer", "warning"),
    [
        (BLOCK + "<|im_end|>\n", f"block ends before '<|im_end|>', {UNTAUGHT}"),
        (BLOCK + "\n{{ eos_token }}", f"block ends before '</s>', {UNTAUGHT}"),
        (BLOCK + "{% if not loop.last %}<|im_end|>{% endif %}", None),
        (BLOCK + "{{ '.' }}", f"at the end of its chat, {UNTAUGHT}"),
        (BLOCK, None),  # the end of the chat gets the end-of-text token
        ("{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}", None),
        ("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n</s>", None),
        ("{{ m.content }}\n", None),
    ],
)  # fmt: skip
def test_templates_that_do_not_teach_the_end(tmp_path, base, answer, warning, caplog):
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        f"{answer}{{% else %}}<|im_start|>user: {{{{ m.content }}}}<|im_end|>\n{{% endif %}}"
        "{% endfor %}"
    )
    (base / "chat_template.jinja").write_text(source)
    documents = read_all(tmp_path, {"messages": [*CHAT, *CHAT]}, base=base)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (warning is not None)
    assert all(warning in said and "\n" not in said for said in warnings)
    if warning is None:
        return
    tokenizer = load_tokenizer(base)
    encoded = encode_documents(tokenizer, documents, 100, eos_id=find_eos_id(tokenizer, base))
    learned = encoded.input_ids[0][encoded.token_type_ids[0] == 1]
    assert not {1, 3} & set(learned.tolist())  # neither </s> nor <|im_end|>


def test_faults_of_places(tmp_path, base):
    for rows, message in (((GOOD, GOOD), "two unlike lines"), (("", " "), "empty file")):
        path = write(tmp_path / "all.jsonl", *rows)
        with pytest.raises(LoraxError, match=rf"all\.jsonl: .*{message}|all\.jsonl: {message}"):
            load_documents("instructions", "train", path)
    with pytest.raises(LoraxError, match=r"dev\.jsonl: cannot be read"):
        load_documents("instructions", "dev", tmp_path)
    with pytest.raises(LoraxError, match=r"jsonl:1: chats need the folder of a tokenizer"):
        read_all(tmp_path, {"messages": CHAT})
    with pytest.raises(LoraxError, match=r"jsonl:1: .*no chat template: put one in .*completion"):
        read_all(tmp_path, {"messages": CHAT}, base=base)
    (tmp_path / "dev.jsonl").write_bytes(b'{}\n{"prompt": "\xff"}')
    with pytest.raises(LoraxError, match=r"dev\.jsonl:2: not UTF-8"):
        load_documents("instructions", "dev", tmp_path)
    with pytest.raises(LoraxError, match="task instructions has documents without labels"):
        load_split("instructions", "train", tmp_path)


def test_where_the_end_of_text_is_named(base, bpe_bos):
    assert find_eos_id(bpe_bos, base) == 1
    config = base / "tokenizer_config.json"
    config.write_text("{}")
    with pytest.raises(LoraxError, match=r"eos_token=None is no token: name one in"):
        find_eos_id(bpe_bos, base)
    (base / "config.json").write_text('{"eos_token_id": [3, 1]}')  # as in GPT-2's own folder
    assert find_eos_id(bpe_bos, base) == 3
    (base / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert find_eos_id(bpe_bos, base) == 1
    config.write_text('{"eos_token": "<none>"}')
    with pytest.raises(LoraxError, match=r"eos_token='<none>' is no token"):
        find_eos_id(bpe_bos, base)
    config.write_text("{")
    with pytest.raises(LoraxError, match=r"tokenizer_config\.json: not JSON"):
        find_eos_id(bpe_bos, base)
    config.write_text("[]")
    with pytest.raises(LoraxError, match=r"tokenizer_config\.json: not a JSON object"):
        find_eos_id(bpe_bos, base)
