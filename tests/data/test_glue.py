import numpy as np
import pytest

from lorax.data import TASKS, get_task, load_split
from lorax.data.tasks import glue as glue_module
from lorax.data.tasks.glue import find_folder
from lorax.errors import LoraxError

GLUE = [name for name, task in TASKS.items() if task.text_columns and name != "reviews"]

COUNTS = {
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "mrpc": (3668, 408),
    "stsb": (5749, 1500),
    "rte": (2490, 277),
    "wnli": (635, 71),
    "qnli": (104743, 5463),
    "qqp": (363846, 40430),
    "mnli": (392702, 9815, 9832),
}

# One valid row a task, in the official columns.
SAMPLES = {
    "cola": (None, "gj04\t0\t*\tThe sailors rode."),
    "sst2": ("sentence\tlabel", 'a " gem . \t1'),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tHe said .\t" He said .'),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t4.750",
    ),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tNo weapons.\tWeapons.\tnot_entailment"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\tThe pin.\tThe carrot.\t1"),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tWhen?\tIn 1970.\tentailment"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tHow?\tWhy?\t1"),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tfiction\t(\t(\t(\t(\tConceptually.\tProduct.\tneutral\tcontradiction",
    ),
}
LABELS = dict(zip(GLUE, (0, 1, 1, 4.75, 1, 1, 0, 1, 2), strict=True))


def write(tmp_path, name, *rows, split="train", header=True):
    folder = tmp_path / TASKS[name].folder
    folder.mkdir(exist_ok=True)
    lines = [SAMPLES[name][0], *rows] if header and SAMPLES[name][0] else rows
    path = folder / f"{split}.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refusal(tmp_path, name, *rows, **options):
    write(tmp_path, name, *rows, **options)
    with pytest.raises(LoraxError) as error:
        load_split(name, "train", tmp_path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", GLUE)
def test_official_row_counts(name):
    task = get_task(name)
    if find_folder(task) is None:
        pytest.skip(f"official {task.folder} is not on this machine")
    loaded = [load_split(task, split) for split in task.splits]
    assert tuple(map(len, loaded)) == COUNTS[name]
    for examples in loaded:
        assert len(examples.labels) == len(examples.first)
        assert (examples.second is None) == (len(task.text_columns) == 1)
        if task.labels:
            assert set(examples.labels.tolist()) == set(range(task.num_outputs))


@pytest.mark.parametrize("name", GLUE)
def test_reads_one_row(name, tmp_path):
    row = SAMPLES[name][1]
    write(tmp_path, name, row)
    for data_dir in (tmp_path, tmp_path / TASKS[name].folder):
        examples = load_split(name, "train", data_dir)
        assert examples.labels.tolist() == [LABELS[name]]
        assert examples.labels.dtype == (np.float32 if name == "stsb" else np.int32)
        assert examples.first[0] in row.split("\t")
        assert examples.second is None or examples.second[0] in row.split("\t")


def test_mnli_dev_splits_have_more_annotators_columns(tmp_path):
    write(tmp_path, "mnli", SAMPLES["mnli"][1])
    header, row = SAMPLES["mnli"]
    for split in ("dev_matched", "dev_mismatched"):
        path = tmp_path / "MNLI" / f"{split}.tsv"
        path.write_text(
            header.replace("label1", "label1\tlabel2") + "\n" + row.replace("\tn", "\tn\tn") + "\n"
        )
        assert load_split("mnli", split, tmp_path).labels.tolist() == [2]


def test_quotes_blanks_and_line_ends_are_text(tmp_path):
    path = write(tmp_path, "sst2", 'one " quote \t1', "caf\u00e9\u2028\t0")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_split("sst2", "train", tmp_path).first == ['one " quote ', "caf\u00e9\u2028"]


def test_qqp_drops_broken_rows_and_keeps_empty_questions(tmp_path, caplog):
    write(tmp_path, "qqp", SAMPLES["qqp"][1], "1\t2\t3\tHow", "1\t2\t3\tHow?\t\t0")
    assert load_split("qqp", "train", tmp_path).second == ["Why?", ""]
    assert "dropped 1 rows" in caplog.text


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("cola", "gj04\t1", "train.tsv:2: 2 fields, expected 4"),
        ("cola", "gj04\t2\t\tA.", "train.tsv:2: unknown label '2'; expected one of 0, 1"),
        ("cola", "gj04\t1\t\t ", "train.tsv:2: sentence is empty"),
        ("rte", "1\ta\tb\tc\tentailment", "train.tsv:3: 5 fields, expected 4"),
        ("rte", "1\ta\tb\t1", "train.tsv:3: unknown label '1'; expected one of entailment, not_"),
        ("rte", "", "train.tsv:3: 1 fields, expected 4"),
        ("mnli", "\t".join("0123456789") + "\tn\t-", "train.tsv:3: unknown label '-'"),
        ("stsb", SAMPLES["stsb"][1].replace("4.750", "5.1"), "score '5.1' is not a number from 0"),
        ("stsb", SAMPLES["stsb"][1].replace("4.750", "nan"), "train.tsv:3: score 'nan'"),
        ("stsb", SAMPLES["stsb"][1].replace("4.750", "high"), "train.tsv:3: score 'high'"),
    ],
)
def test_malformed_row(name, row, message, tmp_path):
    assert message in refusal(tmp_path, name, SAMPLES[name][1], row, SAMPLES[name][1])


def test_wrong_header(tmp_path):
    message = refusal(tmp_path, "rte", SAMPLES["rte"][1], header=False)
    assert "train.tsv:1: no column 'sentence1'; the header has 0, No weapons." in message


def test_empty_files(tmp_path):
    assert "only a header" in refusal(tmp_path, "rte")
    (tmp_path / "RTE" / "train.tsv").write_text("\n")
    with pytest.raises(LoraxError, match=r"train\.tsv: empty file"):
        load_split("rte", "train", tmp_path)


def test_not_utf8(tmp_path):
    write(tmp_path, "sst2", "fine\t1").write_bytes(b"sentence\tlabel\ncaf\xe9 .\t1\n")
    with pytest.raises(LoraxError, match=r"train\.tsv:2: not UTF-8"):
        load_split("sst2", "train", tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(LoraxError, match=r"neither RTE/train\.tsv nor train\.tsv"):
        load_split("rte", "train", tmp_path)
    write(tmp_path, "rte", SAMPLES["rte"][1])
    with pytest.raises(LoraxError, match=r"dev\.tsv: cannot be read \(No such file"):
        load_split("rte", "dev", tmp_path)


def test_unknown_split():
    with pytest.raises(LoraxError, match="no labelled split 'dev'; known: train, dev_matched"):
        load_split("mnli", "dev")


def test_search_order(tmp_path, monkeypatch):
    monkeypatch.setattr(glue_module, "_PROJECT", tmp_path / "project")
    monkeypatch.delenv("LORAX_GLUE_DIR", raising=False)
    cwd = tmp_path / "cwd"
    for root in (tmp_path / "project" / "glue", cwd / "glue", tmp_path / "env"):
        (root / "RTE").mkdir(parents=True)
    (tmp_path / "shared" / "glue" / "CoLA").mkdir(parents=True)
    monkeypatch.chdir(cwd)
    assert find_folder(TASKS["rte"]) == cwd / "glue" / "RTE"
    assert find_folder(TASKS["cola"]).resolve() == tmp_path / "shared" / "glue" / "CoLA"
    assert find_folder(TASKS["mnli"]) is None
    monkeypatch.setenv("LORAX_GLUE_DIR", str(tmp_path / "env"))
    assert find_folder(TASKS["rte"]) == tmp_path / "env" / "RTE"
    monkeypatch.setenv("LORAX_GLUE_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(LoraxError, match="LORAX_GLUE_DIR="):
        find_folder(TASKS["rte"])
