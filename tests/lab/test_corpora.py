"""Text by name, and windows that do not overlap."""

import gzip
import json

import datasets
import pytest
import torch

import nsvd
from nsvd.lab import corpora, tokens
from nsvd.lab.corpora import HUB, MAX_CALIBRATION, beside, sources
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ANSWERS = {"A": "one", "B": "two", "C": "three", "D": "four"}
ROWS = {  # a row as each data set has it, and the document it becomes
    "Salesforce/wikitext": ({"text": " = Title = \n"}, " = Title = \n"),
    "ptb-text-only/ptb_text_only": ({"sentence": "the <unk> rose N points"}, "the <unk> rose N points"),
    "allenai/c4": ({"text": "web page", "timestamp": "", "url": ""}, "web page"),
    "benayas/snips": ({"text": "play some jazz", "category": "PlayMusic"}, "play some jazz"),
    "json": ({"instruction": "Say hello.", "output": "Hello.", "generator": "", "dataset": ""}, "Say hello.\nHello."),
    "sagnikrayc/mctest": (
        {"story": "A story.", "question": "Which?", "answer_options": ANSWERS, "answer": "B"},
        "A story.\nWhich?\nA) one\nB) two\nC) three\nD) four",
    ),
    "hfl/cmrc2018": (
        {"context": "文章。", "question": "谁?", "answers": {"text": ["他", "她"], "answer_start": [0, 1]}},
        "文章。\n谁?\n他",
    ),
    "junsashihara/alpaca_eval_ja": ({"instruction": "挨拶して", "output": "こんにちは"}, "挨拶して\nこんにちは"),
}


@pytest.fixture
def text(tmp_path):
    """A file of 1000 bytes, none like another within reach: ``000 001 002 …``."""
    file = tmp_path / "numbers.txt"
    file.write_text("".join(f"{i:03d} " for i in range(250)), encoding="utf-8")
    return file


def windows(name, **options) -> torch.Tensor:
    return nsvd.windows(str(name), TOKENIZER, **options)


def positions(cut: torch.Tensor, file) -> list[int]:
    """Where in the file each window starts; windows are pieces of it, byte by byte."""
    return [file.read_text(encoding="utf-8").index(TOKENIZER.decode(row)) for row in cut]


def jsonl(file, *lines: str):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def test_test_windows_are_the_whole_text_in_order(text):
    """One after the other from the first token; what does not fill a window is left."""
    cut = windows(text, length=48)
    assert cut.shape == (1000 // 48, 48)
    assert cut.dtype == torch.long
    assert positions(cut, text) == [48 * i for i in range(20)]


def test_some_test_windows_are_drawn_by_seed_and_kept_in_order(text):
    """``count`` of them, the same for the same seed, others for another."""
    few = windows(text, length=20, count=7, seed=3)
    starts = positions(few, text)
    assert few.shape == (7, 20)
    assert starts == sorted(starts)
    assert all(start % 20 == 0 for start in starts)
    assert torch.equal(few, windows(text, length=20, count=7, seed=3))
    assert not torch.equal(few, windows(text, length=20, count=7, seed=4))


@pytest.mark.parametrize("seed", range(5))
def test_calibration_windows_are_disjoint_pieces_of_the_text(seed, text):
    """Cut at a random offset, drawn without replacement, in random order."""
    cut = windows(text, split="calibration", length=48, count=12, seed=seed)
    starts = positions(cut, text)
    offset = starts[0] % 48
    assert cut.shape == (12, 48)
    assert offset <= 1000 % 48
    assert {start % 48 for start in starts} == {offset}
    assert len(set(starts)) == 12
    assert torch.equal(cut, windows(text, split="calibration", length=48, count=12, seed=seed))


def test_another_seed_cuts_elsewhere(text):
    """Offset and order both change."""
    starts = [positions(windows(text, split="calibration", length=48, count=20, seed=s), text) for s in range(6)]
    assert len({min(s) for s in starts}) > 1
    assert len({tuple(s) for s in starts}) == 6
    assert starts[0] != sorted(starts[0])


def test_windows_are_by_default_as_long_as_the_tokenizer_allows(tmp_path):
    """2048 tokens at most; calibration takes 256 of them at most."""
    file = tmp_path / "long.txt"
    file.write_text("abc " * 5000, encoding="utf-8")
    assert windows(file).shape == (20_000 // 64, 64)
    assert windows(file, split="calibration").shape == (MAX_CALIBRATION, 64)
    endless = tiny_tokenizer(int(1e30))
    assert nsvd.windows(str(file), endless).shape == (9, 2048)


@pytest.mark.parametrize("split", ["test", "calibration"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 48, "count": 21}, r"too short: 1000 tokens give 20 of 21 windows of 48"),
        ({"length": 2000}, r"too short: 1000 tokens give 0 of one window of 2000"),
        ({"length": 1}, r"2 tokens at least, not 1"),
        ({"length": 10, "count": 0}, r"0 windows asked for"),
        ({"length": 10, "count": -1}, r"-1 windows asked for"),
    ],
)
def test_more_windows_than_there_are_is_an_error(split, options, message, text):
    """Never fewer than asked for, and never none."""
    with pytest.raises(ValueError, match=message):
        windows(text, split=split, **options)


def test_documents_are_joined_by_empty_lines_and_empty_ones_left_out(tmp_path):
    """From a jsonl file: one document a line."""
    file = jsonl(tmp_path / "two.jsonl", '{"text": "first"}', '{"text": " \\n"}', '{"text": "zweiter é", "id": 3}')
    assert nsvd.documents(str(file)) == ["first", "zweiter é"]
    assert TOKENIZER.decode(windows(file, length=5)[0]) == "first"
    whole = windows(file, length=len("first\n\nzweiter é".encode()))
    assert TOKENIZER.decode(whole[0]) == "first\n\nzweiter é"


@pytest.mark.parametrize(
    "line", ["no json", '"a string"', "[1]", '{"body": "text"}', '{"text": 5}', '{"text": null}', ""]
)
def test_a_line_that_is_no_document_is_named(line, tmp_path):
    """File and line number."""
    file = jsonl(tmp_path / "bad.jsonl", '{"text": "good"}', line, '{"text": "good"}')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: expected"):
        nsvd.documents(str(file))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"text": "x \ud83d y"}', r"line 2: the text holds \\ud83d, half a surrogate pair"),
        (r'{"text": "\udc00"}', r"line 2: the text holds \\udc00"),
        ("[" * 100_000, "line 2: expected"),
        ('{"text": ' + "[" * 100_000, "line 2: expected"),
        ('{"text": ' + "1" * 5000 + "}", "line 2: expected"),
    ],
)
def test_a_line_that_no_tokenizer_could_read_is_named(line, message, tmp_path):
    """Half a character, nests too deep for a parser, a number too long for one."""
    file = jsonl(tmp_path / "bad.jsonl", '{"text": "good"}', line)
    with pytest.raises(ValueError, match=message):
        windows(file, length=8)


def test_whole_surrogate_pairs_and_a_byte_order_mark_are_text(tmp_path):
    """As JSON and Windows write them."""
    file = tmp_path / "pair.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + rb'{"text": "\ud83d\ude00"}' + b"\r\n" + b'{"text": "a"}\r\n')
    assert nsvd.documents(str(file)) == ["\U0001f600", "a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"some text", mtime=0), r"zipped\.txt is not UTF-8 text"),
        ("some text".encode("utf-16"), r"zipped\.txt is not UTF-8 text"),
        ("some text".encode("utf-16-le"), r"zipped\.txt is not UTF-8 text: it holds NUL bytes"),
    ],
)
def test_a_file_of_something_else_is_no_text(content, message, tmp_path):
    """Whatever its name."""
    (tmp_path / "zipped.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        nsvd.documents(str(tmp_path / "zipped.txt"))


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl"])
def test_a_folder_is_no_file(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{name} is a folder, not a file"):
        nsvd.documents(str(tmp_path / name))


@pytest.mark.parametrize("split", ["test", "calibration"])
@pytest.mark.parametrize("options", [{"length": 10**12}, {"length": 256, "count": 10**11}])
def test_far_too_much_is_refused_before_anything_is_tokenized(split, options, text, monkeypatch):
    monkeypatch.setattr(corpora, "token_ids", None)
    with pytest.raises(ValueError, match=r"too short: 1000 characters for .* tokens"):
        windows(text, split=split, **options)


@pytest.mark.parametrize("split", ["test", "calibration"])
@pytest.mark.parametrize("count", [None, 7])
def test_windows_begin_with_a_bos_where_the_tokenizer_adds_one(split, count, text):
    """Or where it is asked for; it is one of the tokens, and the text goes on behind it without a gap."""
    opening, options = tiny_tokenizer(bos=True), {"split": split, "length": 25, "count": count}
    cut = nsvd.windows(str(text), opening, **options)
    assert cut.shape == (count or 1000 // 24, 25) if split == "test" else (count or 41, 25)
    assert (cut[:, 0] == 0).all()
    bare = windows(text, **options | {"length": 24})
    assert torch.equal(cut[:, 1:], bare)
    assert torch.equal(cut, windows(text, **options, bos=True))
    without = windows(text, **options)
    assert torch.equal(nsvd.windows(str(text), opening, **options, bos=False), without)
    assert (without[:, 0] != 0).any()


@pytest.mark.parametrize("split", ["test", "calibration"])
def test_of_a_long_text_only_what_is_needed_is_tokenized(split, tmp_path, monkeypatch):
    """Above ``WHOLE`` characters; all windows are still all of the text, and too many windows are still too many."""
    monkeypatch.setattr(corpora, "WHOLE", 1000)
    file = tmp_path / "long.txt"
    file.write_text("".join(f"{i:05d} " for i in range(10_000)), encoding="utf-8")
    seen, whole = [], tokens._tokens
    monkeypatch.setattr(tokens, "_tokens", lambda tokenizer, text: seen.append(len(text)) or whole(tokenizer, text))
    few = windows(file, split=split, length=16, count=8, seed=2)
    starts = positions(few, file)
    assert few.shape == (8, 16)
    assert len(set(starts)) == 8
    assert (starts == sorted(starts)) == (split == "test")
    assert torch.equal(few, windows(file, split=split, length=16, count=8, seed=2))
    assert not torch.equal(few, windows(file, split=split, length=16, count=8, seed=3))
    assert max(seen) < 1000
    assert sum(seen) < 20_000
    assert len(windows(file, split=split, length=16, count=3000)) == 3000
    with pytest.raises(ValueError, match="60000 tokens give 3750 of 4000 windows of 16"):
        windows(file, split=split, length=16, count=4000)


@pytest.mark.parametrize(
    ("name", "content"), [("empty.txt", ""), ("blank.jsonl", '{"text": "  "}\n'), ("no.jsonl", "")]
)
def test_an_empty_corpus_is_an_error(name, content, tmp_path):
    """No text is not a text."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="is empty"):
        nsvd.documents(str(tmp_path / name))


def test_a_folder_of_corpora_is_read_by_split(tmp_path):
    """``DIR:name`` is ``DIR/name/<split>.jsonl``."""
    jsonl(tmp_path / "news" / "test.jsonl", '{"text": "for the test"}')
    jsonl(tmp_path / "news" / "calibration.jsonl", '{"text": "to calibrate"}')
    assert nsvd.documents(f"{tmp_path}:news") == ["for the test"]
    assert nsvd.documents(f"{tmp_path}:news", "calibration") == ["to calibrate"]
    with pytest.raises(FileNotFoundError, match=r"other.test\.jsonl"):
        nsvd.documents(f"{tmp_path}:other")


def test_what_is_no_corpus_is_said(tmp_path):
    """An unknown name with the known ones, a file that is not there, an unknown split."""
    for unknown in ("wikitext3", "mini/novels"):
        with pytest.raises(
            ValueError, match=rf"unknown corpus '{unknown}'; use mini/encyclopedia.*wikitext2.*DIR:name"
        ):
            nsvd.documents(unknown)
    for missing in (tmp_path / "none.txt", tmp_path / "none.jsonl"):
        with pytest.raises(FileNotFoundError, match="no file"):
            nsvd.documents(str(missing))
    with pytest.raises(ValueError, match="unknown split 'train'"):
        nsvd.documents("mini/web", "train")


@pytest.mark.parametrize("name", nsvd.EMBEDDED)
def test_the_embedded_test_corpora_are_there(name):
    """Eight roles, of some thousand bytes each."""
    assert len(nsvd.documents(name)) > 1
    assert len(windows(name, length=64)) > 300


def test_the_embedded_calibration_text_is_none_of_the_test_text():
    """Only the encyclopedia has one."""
    calibration = nsvd.documents("mini/encyclopedia", "calibration")
    assert sum(map(len, calibration)) > 100_000
    assert not set(calibration) & set(nsvd.documents("mini/encyclopedia"))
    with pytest.raises(FileNotFoundError, match="mini/web"):
        nsvd.documents("mini/web", "calibration")


def rows_and_documents(path: str) -> tuple[list[dict], list[str]]:
    """Three rows that differ in their first field, and the documents they become."""
    row, document = ROWS[path]
    name, text = next(iter(row.items()))
    return [row | {name: f"{text}{i}"} for i in range(3)], [document.replace(text, f"{text}{i}") for i in range(3)]


@pytest.fixture
def hub(monkeypatch):
    """``load_dataset`` gives rows of the right schema without a network; returns what it was asked for."""
    asked = []

    def load_dataset(path, **options):
        asked.append({"path": path} | options)
        return rows_and_documents(path)[0]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", HUB)
def test_the_paper_s_corpora_are_read_from_the_hub(name, hub):
    """Each row becomes the document of the paper; the split asked for is the data set's own name of it."""
    corpus = HUB[name]
    _, expected = rows_and_documents(corpus.arguments["path"])
    assert nsvd.documents(name) == expected
    assert hub == [corpus.arguments | {"split": corpus.splits["test"]}]
    if "calibration" in corpus.splits:
        assert nsvd.documents(name, "calibration") == expected
        assert hub[1]["split"] == "train"
    else:
        with pytest.raises(ValueError, match=f"{name} has no calibration split"):
            nsvd.documents(name, "calibration")
    joined = windows(name, length=2 * len(expected[0].encode()))
    assert TOKENIZER.decode(joined[0]).startswith(expected[0] + "\n\n")


@pytest.mark.parametrize(("name", "text"), [("mctest", "story"), ("cmrc2018", "context")])
def test_a_text_with_several_questions_is_read_once(name, text):
    """Rows that follow one another with the same text are one document; the text opens it, the questions follow."""
    row = ROWS[HUB[name].arguments["path"]][0]
    first, second = HUB[name].read([row, row | {"question": "Why?"}, row | {text: "Another."}])
    assert first.count(row[text]) == 1
    assert row["question"] in first
    assert "Why?" in first
    assert second.startswith("Another.")


def test_only_the_first_documents_of_c4_are_read(hub, monkeypatch):
    """Of as many as there are, 2000; the last is not waited for."""

    def endless(path, **options):
        while True:
            yield ROWS[path][0]

    monkeypatch.setattr(datasets, "load_dataset", endless)
    assert len(nsvd.documents("c4")) == 2000


@pytest.mark.parametrize("name", HUB)
def test_without_a_hub_the_embedded_corpora_are_recommended(name, monkeypatch):
    """One sentence in place of a traceback through a network library."""

    def unreachable(*_args, **_options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=rf"corpus {name} could not be had from the hub; .*mini/encyclopedia"):
        nsvd.documents(name)


def test_windows_beside_those_that_are_tested_are_none_of_them():
    tokenizer = tiny_tokenizer(16)
    tested = nsvd.windows("mini/reading_zh", tokenizer, length=16, count=5, seed=3)
    others = beside("mini/reading_zh", tokenizer, tested, 7, seed=3)
    assert others.shape == (7, 16)
    assert not set(map(tuple, others.tolist())) & set(map(tuple, tested.tolist()))
    with pytest.raises(ValueError, match="5 windows of 16 tokens leave 12, not 7"):
        beside("mini/reading_zh", tokenizer, tested + 300, 7, seed=3)


@pytest.mark.parametrize("bos", [True, False])
def test_a_window_is_of_the_document_in_which_its_middle_lies(tmp_path, bos, monkeypatch):
    """As a tokenizer of bytes has it: character n of the joined text is token n."""
    lengths = [5, 70, 3, 122]
    texts = [chr(97 + n) * 2 + "".join(f"{n}{i:02d} " for i in range(50)) for n in range(4)]
    texts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
    file = tmp_path / "four.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    owner = [n for n, text in enumerate(texts) for _ in text + "\n\n"]
    monkeypatch.setattr(tokens, "PIECE", 64)  # the text is tokenized in four pieces
    body, whole = 10 - bos, nsvd.windows(str(file), TOKENIZER, length=10, bos=bos)
    expected = [owner[i * body + body // 2] for i in range(len(whole))]
    assert sources(str(file), TOKENIZER, whole, bos=bos) == expected
    assert set(expected) == {0, 1, 3}
    some = nsvd.windows(str(file), TOKENIZER, length=10, count=6, bos=bos)
    assert sources(str(file), TOKENIZER, some, bos=bos) == [expected[whole.tolist().index(w)] for w in some.tolist()]
    with pytest.raises(ValueError, match="has no such window"):
        sources(str(file), TOKENIZER, whole + 1, bos=bos)
    only = tmp_path / "one.jsonl"
    only.write_text(json.dumps({"text": "".join(texts)}), encoding="utf-8")
    one = nsvd.windows(str(only), TOKENIZER, length=10, bos=bos)
    assert sources(str(only), TOKENIZER, one, bos=bos) == list(range(len(one))), "and of one document"
    monkeypatch.setattr(corpora, "WHOLE", 100)
    assert sources(str(file), TOKENIZER, some, bos=bos) == list(range(6)), "of a long text every window stands alone"
