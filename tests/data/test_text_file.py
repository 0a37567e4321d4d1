import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax.config import TaskConfig, TrialConfig
from lorax.data import content_of, encode_documents, load_documents
from lorax.data.tasks.text_file import cut_text
from lorax.errors import LoraxError
from lorax.runs.trial_id import trial_id

LINES = [f"Line {n} of caf\u00e9s.\n" for n in range(100)]


def test_a_file_gives_its_last_tenth(tmp_path, bpe_bos):
    path = tmp_path / "mine.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    train, dev = (load_documents("text", split, path) for split in ("train", "dev"))
    assert train.texts + dev.texts == ["".join(LINES[:90]), "".join(LINES[90:])]
    assert train.targets == [((0, len(train.texts[0])),)] and train.form == "text"
    encoded = encode_documents(bpe_bos, train, 32, eos_id=1)
    said = [n for ids in encoded.input_ids for n in ids[1:].tolist()]
    assert bpe_bos.decode(said) == train.texts[0]
    assert set(encoded.lengths[:-1].tolist()) == {32}


@given(text=st.text(alphabet="ab \n\r", max_size=60))
def test_nothing_is_lost_and_no_line_is_cut(text):
    try:
        train, dev = cut_text(text, "a.txt")
    except LoraxError:
        assert "\n" not in text.strip()
        return
    assert train + dev == text
    assert train.strip() and dev.strip()
    assert "\n" in train[len(train.rstrip()) :]


def test_a_paragraph_is_kept_whole_where_one_ends_near():
    paragraph = "x\n" * 10
    text = "\n".join([paragraph] * 13)
    train, dev = cut_text(text, "a.txt")
    assert train == (paragraph + "\n") * 12 and dev == paragraph
    windows = text.replace("\n", "\r\n")
    assert cut_text(windows, "a.txt") == (train.replace("\n", "\r\n"), dev.replace("\n", "\r\n"))
    two = paragraph + "\n" + "y\n" * 15  # the break is far from nine tenths
    assert cut_text(two, "a.txt")[1] == "y\n" * 3


def test_a_folder_gives_its_files(tmp_path):
    for split in ("train", "dev"):
        (tmp_path / f"{split}.txt").write_bytes(b"\xef\xbb\xbf" + f"{split}\r\n".encode())
        assert load_documents("text", split, tmp_path).texts == [f"{split}\r\n"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"mine\.txt: empty file"),
        (b" \n\n", r"mine\.txt: empty file"),
        (b"\n one line alone \n", r"mine\.txt: a single line, which gives no train and dev"),
        (b"fine\nso far\ncaf\xe9\n", r"mine\.txt:3: not UTF-8 \(invalid continuation byte\)"),
    ],
)
def test_faults_of_a_file(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    for split in ("train", "dev"):
        with pytest.raises(LoraxError, match=message):
            load_documents("text", split, path)


def test_faults_of_places(tmp_path, bpe):
    with pytest.raises(LoraxError, match=r"task text reads your own files: set task\.data_dir"):
        load_documents("text", "train", None)
    with pytest.raises(LoraxError, match=r"task\.data_dir='.*/no': no such file or folder"):
        load_documents("text", "train", tmp_path / "no")
    with pytest.raises(LoraxError, match=r"train\.txt: cannot be read \(No such file"):
        load_documents("text", "train", tmp_path)
    (tmp_path / "train.txt").write_text("\n")
    with pytest.raises(LoraxError, match=r"train\.txt: empty file"):
        load_documents("text", "train", tmp_path)
    with pytest.raises(LoraxError, match=r"task text has no labelled split 'test'"):
        load_documents("text", "test", tmp_path)
    with pytest.raises(LoraxError, match="task cola has labelled examples: use load_split"):
        load_documents("cola", "train", tmp_path)
    (tmp_path / "train.txt").write_text("x")
    with pytest.raises(LoraxError, match="no token to be predicted is left in 1 documents"):
        encode_documents(bpe, load_documents("text", "train", tmp_path), 8)


def test_another_content_is_another_trial(tmp_path):
    file, folder = tmp_path / "a.txt", tmp_path / "pairs"
    folder.mkdir()
    file.write_text("One.\nTwo.\n")
    (folder / "train.jsonl").write_text("{}")
    seen = [content_of("text", file), content_of("instructions", folder)]
    file.write_text("One.\nToo.\n")
    (folder / "dev.jsonl").write_text("{}")
    seen += [content_of("text", str(file)), content_of("instructions", folder)]
    (folder / "dev.jsonl").rename(folder / "test.jsonl")
    seen += [content_of("instructions", folder)]
    assert len(set(seen)) == len(seen)
    names = {trial_id(TrialConfig(task=TaskConfig("text", "a.txt", content=x))) for x in seen}
    assert len(names) == len(seen)
    assert content_of("text", tmp_path / "nowhere") is None
    assert content_of("sst2", folder) is None and content_of("text", None) is None
