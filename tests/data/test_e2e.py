import csv

import pytest

from lorax.data import encode_documents, load_documents, load_tokenizer, references_by_mr
from lorax.data.tasks.e2e import prompt_of
from lorax.errors import LoraxError

SPICE = "name[Blue Spice], eatType[coffee shop], area[city centre]"
VAULTS = (
    "name[The Vaults], priceRange[\u00a320-25, or more], customer rating[5 out of 5], "
    "familyFriendly[yes], near[Caf\u00e9 Adriatic], food[]"
)
ROWS = [
    (SPICE, "A coffee shop in the city centre area called Blue Spice."),
    (VAULTS, 'The Vaults, near "Caf\u00e9 Adriatic",\nis \u00a320-25.'),
    (SPICE, "Blue Spice is a coffee shop."),
]


def write(path, rows, header=("mr", "ref")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "trainset.csv", ROWS)
    write(tmp_path / "devset.csv", ROWS[:1])
    write(tmp_path / "testset_w_refs.csv", ROWS)
    return tmp_path


def test_prompts():
    assert prompt_of(SPICE) == "name : Blue Spice | Type : coffee shop | area : city centre"
    assert prompt_of(VAULTS) == (
        "name : The Vaults | price : \u00a320-25, or more | customer rating : 5 out of 5 | "
        "family friendly : yes | near : Caf\u00e9 Adriatic | food : "
    )
    for mr in ("", "name", "name[a] area[b]", "name[a],", "[a]", "name[a], b"):
        with pytest.raises(LoraxError, match=r"x:1: .* is no list of slot\[value\]"):
            prompt_of(mr, "x:1")


def test_documents(folder, base):
    documents = load_documents("e2e", "train", folder, base)
    first = "name : Blue Spice | Type : coffee shop | area : city centre<s> " + ROWS[0][1]
    assert documents.texts[0] == first
    pairs = zip(documents.texts, documents.targets, strict=True)
    assert [[text[a:b] for a, b in spans] for text, spans in pairs] == [
        [f" {reference}"] for _, reference in ROWS
    ]
    assert [len(load_documents("e2e", s, folder, base)) for s in ("dev", "test")] == [1, 3]
    plain = load_documents("e2e", "train", folder)  # no tokenizer, no token between
    assert plain.texts[0] == first.replace("<s>", "\n")
    tokenizer = load_tokenizer(base)
    encoded = encode_documents(tokenizer, documents, 200, eos_id=1)
    ids, marks = encoded.input_ids[1], encoded.token_type_ids[1]
    assert tokenizer.decode(ids[marks == 1], skip_special_tokens=False) == f" {ROWS[1][1]}</s>"
    given = tokenizer.decode(ids[marks == 0], skip_special_tokens=False)
    assert given == f"<s>{prompt_of(VAULTS)}<s>"


def test_references_of_each(folder):
    groups = references_by_mr("test", folder)
    assert [*groups.items()] == [(SPICE, [ROWS[0][1], ROWS[2][1]]), (VAULTS, [ROWS[1][1]])]


def test_columns_of_the_cleaned_release(folder):
    rows = [(SPICE, "1", reference, mr) for mr, reference in ROWS]
    write(folder / "trainset.csv", rows, ("mr", "fixed", "ref", "orig_mr"))
    assert references_by_mr("train", folder) == {SPICE: [reference for _, reference in ROWS]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"trainset\.csv:1: no column 'ref'"),
        ("mr,text\n", r"trainset\.csv:1: no column 'ref'; the header must be mr,ref"),
        ("mr,ref\n", r"trainset\.csv: no examples, only a header"),
        ("mr,ref\nname[a],b\nname[a]\n", r"trainset\.csv:3: expected an mr and a ref"),
        ("mr,ref\nname[a], \n", r"trainset\.csv:2: expected an mr and a ref, neither"),
        ("mr,ref\nname[a],b,c\n", r"trainset\.csv:2: expected an mr and a ref"),
        ('mr,ref\nname[a],"b\nc"\nname,b\n', r"trainset\.csv:4: 'name' is no list of slot"),
        ('mr,ref\nname[a],"b\n', r"trainset\.csv:2: not CSV \(unexpected end of data\)"),
    ],
)
def test_malformed(tmp_path, content, message):
    (tmp_path / "trainset.csv").write_text(content)
    with pytest.raises(LoraxError, match=message) as caught:
        load_documents("e2e", "train", tmp_path)
    assert "\n" not in str(caught.value)


def test_missing(tmp_path):
    with pytest.raises(LoraxError, match=r"holds no devset\.csv: give .*rename train-fixed\.no-ol"):
        load_documents("e2e", "dev", tmp_path)
    (tmp_path / "devset.csv").write_bytes(b"mr,ref\nname[a],\xff\n")
    with pytest.raises(LoraxError, match=r"devset\.csv:2: not UTF-8"):
        load_documents("e2e", "dev", tmp_path)
    with pytest.raises(LoraxError, match=r"set task\.data_dir"):
        load_documents("e2e", "dev", None)
