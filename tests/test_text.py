import random
from pydoc_data.topics import topics

import datasets
import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arbllm import text
from arbllm.errors import TextError
from arbllm.text import calibration_windows, evaluation_tokens, load_text
from tests.data import needs
from tests.tiny import byte_tokenizer


def tokens_of(string: str) -> torch.Tensor:
    """What `byte_tokenizer` makes of it: one token a byte, so windows can be compared with text."""
    return torch.tensor(byte_tokenizer()(string)["input_ids"])


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves the rows put into it, and keeps what it was asked."""

    class Hub(dict):
        asked: list[tuple]

        def load_dataset(self, repository: str, configuration: str | None, **options: object) -> dict:
            self.asked.append((repository, configuration, options))
            return self[repository, options["split"]]

    served = Hub()
    served.asked = []
    monkeypatch.setattr(datasets, "load_dataset", served.load_dataset)
    monkeypatch.setattr(text, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return served


def test_wikitext2_rows_are_joined_by_a_blank_line(hub):
    hub["Salesforce/wikitext", "test"] = {"text": ["", " = A = \n", "", " b \n"]}
    assert load_text("wikitext2", "test") == "\n\n = A = \n\n\n\n\n b \n"
    assert hub.asked[0][:2] == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert torch.equal(evaluation_tokens("wikitext2", byte_tokenizer()), tokens_of("\n\n = A = \n\n\n\n\n b \n"))


def test_ptb_sentences_are_joined_by_a_space_and_read_from_the_converted_branch(hub):
    hub["ptb-text-only/ptb_text_only", "train"] = {"sentence": ["no it was", "n't"]}
    assert load_text("ptb") == "no it was n't"
    repository, configuration, options = hub.asked[0]
    assert (repository, configuration) == ("ptb-text-only/ptb_text_only", "penn_treebank")
    assert options["revision"] == "refs/convert/parquet"


def test_c4_evaluates_on_the_first_1100_validation_documents(hub):
    hub["allenai/c4", "validation"] = {"text": [f"document {i}" for i in range(1200)]}
    joined = " ".join(f"document {i}" for i in range(1100))
    assert load_text("c4", "test") == joined
    assert torch.equal(evaluation_tokens("c4", byte_tokenizer()), tokens_of(joined))
    assert hub.asked[0][2]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}


def test_c4_evaluates_on_at_most_256_windows(hub):
    hub["allenai/c4", "validation"] = {"text": ["x" * 600_000]}
    assert evaluation_tokens("c4", byte_tokenizer()).shape == (256 * 2048,)


def test_c4_windows_come_from_long_documents_in_the_order_of_the_paper(hub):
    source = random.Random(5)
    documents = ["".join(source.choices("abcdef", k=source.randint(1, 60))) for _ in range(40)]
    hub["allenai/c4", "train"] = {"text": documents}
    windows = calibration_windows("c4", byte_tokenizer(), windows=6, length=30, seed=7)
    generator = random.Random(7)
    expected: list[torch.Tensor] = []
    while len(expected) < 6:
        document = tokens_of(documents[generator.randint(0, 39)])
        if len(document) > 30:
            start = generator.randint(0, len(document) - 31)
            expected.append(document[start : start + 30])
    assert torch.equal(windows, torch.stack(expected))
    assert hub.asked[0][2]["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}


def test_c4_without_long_documents_ends(hub, monkeypatch):
    monkeypatch.setattr(text, "C4_TRIES_PER_WINDOW", 20)
    hub["allenai/c4", "train"] = {"text": ["short"] * 10}
    with pytest.raises(TextError, match=r"c4: too few documents are longer than 30 tokens \(0 found, 2 asked for\)"):
        calibration_windows("c4", byte_tokenizer(), windows=2, length=30)


def test_hub_texts_give_windows_at_random_offsets(hub):
    rows = [f"row {i} \n" for i in range(100)]
    hub["Salesforce/wikitext", "train"] = {"text": rows}
    whole = tokens_of("\n\n".join(rows))
    windows = calibration_windows("wikitext2", byte_tokenizer(), windows=200, length=50, seed=3)
    generator = random.Random(3)
    starts = [generator.randint(0, len(whole) - 51) for _ in range(200)]
    assert torch.equal(windows, torch.stack([whole[start : start + 50] for start in starts]))


def test_a_hub_text_shorter_than_a_window(hub):
    hub["Salesforce/wikitext", "train"] = {"text": ["0123456789"]}
    with pytest.raises(TextError, match="wikitext2: its 10 tokens hold 1 windows of 10, not 4"):
        calibration_windows("wikitext2", byte_tokenizer(), windows=4, length=10)


def test_without_the_hub_the_local_alternatives_are_named(monkeypatch):
    monkeypatch.setattr(text, "hub_is_reachable", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("c4", "wikitext2", "ptb"):
        with pytest.raises(
            TextError, match=rf"{name}: .*cannot be reached.*--calibration builtin.*path of a text file"
        ):
            calibration_windows(name, byte_tokenizer())


def test_offline_mode_reads_the_cache(hub, monkeypatch):
    monkeypatch.setattr(text, "hub_is_reachable", lambda: pytest.fail("asked the hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub["Salesforce/wikitext", "train"] = {"text": ["cached"]}
    assert load_text("wikitext2") == "cached"


def test_a_data_set_that_fails_to_load_says_why(hub):
    with pytest.raises(TextError, match=r"ptb: ptb-text-only/ptb_text_only cannot be loaded .*builtin"):
        load_text("ptb")


def test_a_plain_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("one\n\n two\n", encoding="utf-8")
    assert load_text(str(path)) == load_text(str(path), "test") == "one\n\n two\n"


def test_a_raw_file_is_cut_into_rows_as_the_hub_cuts_wikitext(tmp_path):
    path = tmp_path / "wiki.test.raw"
    path.write_text(" \n = A = \n \n b\u2028c \n", encoding="utf-8")
    assert load_text(str(path)) == "\n\n".join(["", " = A = \n", "", " b\u2028c \n"])


def test_wikitext2_in_a_raw_file_has_the_rows_that_the_hub_declares():
    """The data set's card: 4,358 rows and 1,305,088 bytes, of which four a row are offsets."""
    rows = text._wikitext_rows(needs("wikitext2", "wiki.test.raw").read_text(encoding="utf-8"))
    assert len(rows) == 4358
    assert sum(len(row.encode()) for row in rows) + 4 * len(rows) == 1_305_088


@given(st.integers(1, 12), st.integers(2, 40), st.integers(0, 60), st.integers(0, 2**32))
def test_windows_of_a_file_do_not_overlap_and_fit_exactly(windows, length, slack, seed):
    whole = torch.arange(windows * length + slack)

    class Numbers:
        def __call__(self, _: str, verbose: bool) -> dict:
            return {"input_ids": whole.tolist()}

    taken = calibration_windows(__file__, Numbers(), windows, length, seed)
    assert taken.shape == (windows, length)
    assert (taken.diff(dim=1) == 1).all()
    assert (taken.flatten().diff() >= 1).all()
    assert torch.equal(taken, calibration_windows(__file__, Numbers(), windows, length, seed))


def test_another_seed_gives_other_windows():
    first, second = (calibration_windows("builtin", byte_tokenizer(), 4, 64, seed) for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("windows", "message"), [(11, "choose --windows 10, a shorter"), (300, "choose --windows 10")])
def test_a_text_too_short_says_how_many_windows_fit(tmp_path, windows, message):
    path = tmp_path / "short.txt"
    path.write_text("x" * 109)
    with pytest.raises(TextError, match=rf"109 tokens hold 10 windows of 10, not {windows}; {message}"):
        calibration_windows(str(path), byte_tokenizer(), windows, 10)
    assert calibration_windows(str(path), byte_tokenizer(), 10, 10).shape == (10, 10)


def test_a_text_shorter_than_one_window_does_not_propose_none(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("xxx")
    with pytest.raises(TextError, match="hold 0 windows of 10, not 1; a shorter"):
        calibration_windows(str(path), byte_tokenizer(), 1, 10)


def test_the_builtin_text_keeps_a_fifth_apart_for_evaluation():
    train, test = load_text("builtin"), load_text("builtin", "test")
    assert len(train) > 200_000
    assert len(test) == pytest.approx(len(train) / 4, rel=0.05)
    assert not set(train.split("\n\n")) & set(test.split("\n\n"))
    known = {part.strip("\n") for part in "\n\n".join(topics.values()).split("\n\n")} - {""}
    assert set(train.split("\n\n")) | set(test.split("\n\n")) == known


@pytest.mark.parametrize("content", ["", " \n\n\t"])
@pytest.mark.parametrize("name", ["empty.txt", "empty.raw"])
def test_an_empty_file(tmp_path, content, name):
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=f"{name}: this text is empty"):
        load_text(str(tmp_path / name))


def test_files_that_are_not_text(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(TextError, match=r"image\.png: not a text file in UTF-8 \(byte 0\)"):
        load_text(str(tmp_path / "image.png"))
    for name in (str(tmp_path), str(tmp_path / "absent.txt"), "wikitext3"):
        with pytest.raises(TextError, match="neither a text file nor one of c4, wikitext2, ptb, builtin"):
            load_text(name)


@pytest.mark.parametrize(("windows", "length"), [(0, 10), (10, 0), (-1, 10)])
def test_no_windows_at_all(windows, length):
    with pytest.raises(TextError, match="at least one window"):
        calibration_windows("builtin", byte_tokenizer(), windows, length)
