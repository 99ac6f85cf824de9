import json

import pytest
import torch
import yaml
from torch.nn.functional import log_softmax

from arbllm.errors import ConfigError, TextError
from arbllm.evaluation import tasks
from arbllm.evaluation.tasks import TASKS, TaskScore, averages, check_tasks, definition, evaluate_tasks
from arbllm.model import likelihood
from tests.data import needs
from tests.helpers import pack_randomly
from tests.tiny import byte_tokenizer, tiny_llama

WORDS = ("a stone", "water", "the long way home", "rust", "seven", "an old oak", "nothing at all", "light")


def question(number: int, labels: str) -> dict:
    choices = [{"text": WORDS[(number + 3 * place) % 8], "label": label} for place, label in enumerate(labels)]
    return {"question": {"stem": f"What is {number}?", "choices": choices}, "answerKey": labels[number % len(labels)]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A raw file of every task, ten items each."""
    folder = tmp_path_factory.mktemp("qa")
    arc = [question(number, "1234" if number % 2 else "ABCDE") for number in range(10)]
    rows = {
        "arc/ARC-Easy-Test.jsonl": arc,
        "arc/ARC-Challenge-Test.jsonl": arc[::-1],
        "boolq/dev.jsonl": [
            {"question": f"is it {word}", "passage": f"It is {word}.", "answer": number % 3 == 0}
            for number, word in enumerate(WORDS)
        ],
        "hellaswag/hellaswag_val_preprocessed.jsonl": [
            {"ind": number, "query": f"Walk: {word}. they", "endings": list(WORDS[:4]), "label": number % 4}
            for number, word in enumerate(WORDS)
        ],
        "openbookqa/test.jsonl": [question(number, "ABCD") for number in range(10)],
        "piqa/valid.jsonl": [{"goal": f"find {word}", "sol1": "look", "sol2": "ask around"} for word in WORDS],
        "winogrande/dev.jsonl": [
            {"sentence": f"Ann met Bo and _ took {word}.", "option1": "Ann", "option2": "Bo", "answer": "12"[place % 2]}
            for place, word in enumerate(WORDS)
        ],
    }  # fmt: skip
    for name, items in rows.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "piqa" / "valid-labels.lst").write_text("0\n1\n1\n0\n1\n0\n1\n1\n")
    return folder


def log_likelihood(model, context: str, continuation: str) -> float:
    """Spelled out: a token a byte, one text at a time."""
    tokens = torch.tensor(
        [list(map(byte_tokenizer().convert_tokens_to_ids, byte_tokenizer().tokenize(context + continuation)))]
    )
    with torch.no_grad():
        logits = log_softmax(model(tokens[:, :-1]).logits[0].double(), dim=-1)
    return float(logits[range(logits.shape[0]), tokens[0, 1:]][-len(continuation) :].sum())


def accuracy(scores: list[list[float]], gold: list[int]) -> float:
    return sum(max(range(len(s)), key=s.__getitem__) == g for s, g in zip(scores, gold, strict=True)) / len(gold)


def items(data, name: str) -> list[dict]:
    return [json.loads(line) for line in (data / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def sharp():
    """A model whose answers differ clearly, and which reads the long prompts."""
    model = tiny_llama(max_position_embeddings=2048, tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def scores(sharp, data) -> dict[str, TaskScore]:
    return {score.task: score for score in evaluate_tasks(sharp, byte_tokenizer(), TASKS, data=data)}


@pytest.mark.parametrize("task", ["arc_easy", "openbookqa"])
def test_questions_are_scored_by_log_likelihood(sharp, data, scores, task):
    file, prompt = {
        "arc_easy": ("arc/ARC-Easy-Test.jsonl", "Question: {}\nAnswer:"),
        "openbookqa": ("openbookqa/test.jsonl", "{}"),
    }[task]
    likelihoods, gold, lengths = [], [], []
    for item in items(data, file):
        texts = [choice["text"] for choice in item["question"]["choices"]]
        context = prompt.format(item["question"]["stem"])
        likelihoods.append([log_likelihood(sharp, context, f" {text}") for text in texts])
        lengths.append([len(text) for text in texts])
        gold.append([choice["label"] for choice in item["question"]["choices"]].index(item["answerKey"]))
    normalized = [[s / n for s, n in zip(*pair, strict=True)] for pair in zip(likelihoods, lengths, strict=True)]
    assert scores[task].acc == pytest.approx(accuracy(likelihoods, gold))
    assert scores[task].acc_norm == pytest.approx(accuracy(normalized, gold))
    share = scores[task].acc
    assert scores[task].acc_stderr == pytest.approx((share * (1 - share) / (len(gold) - 1)) ** 0.5)
    assert scores[task].items == len(gold)


def test_winogrande_scores_what_follows_the_gap(sharp, data, scores):
    likelihoods, gold = [], []
    for item in items(data, "winogrande/dev.jsonl"):
        before, after = item["sentence"].split("_")
        options = (item["option1"], item["option2"])
        likelihoods.append([log_likelihood(sharp, before + option, f" {after.strip()}") for option in options])
        gold.append(int(item["answer"]) - 1)
    assert scores["winogrande"].acc == pytest.approx(accuracy(likelihoods, gold))
    assert scores["winogrande"].acc_norm is None


def test_boolq_piqa_and_hellaswag(sharp, data, scores):
    cases = {
        "boolq": [
            (f"{i['passage']}\nQuestion: {i['question']}?\nAnswer:", ["no", "yes"], int(i["answer"]))
            for i in items(data, "boolq/dev.jsonl")
        ],
        "piqa": [
            (f"Question: {i['goal']}\nAnswer:", [i["sol1"], i["sol2"]], int(label))
            for i, label in zip(
                items(data, "piqa/valid.jsonl"), (data / "piqa/valid-labels.lst").read_text().split(), strict=True
            )
        ],
        "hellaswag": [
            (i["query"], i["endings"], i["label"]) for i in items(data, "hellaswag/hellaswag_val_preprocessed.jsonl")
        ],
    }
    for task, asked in cases.items():
        likelihoods = [[log_likelihood(sharp, text, f" {c}") for c in choices] for text, choices, _ in asked]
        assert scores[task].acc == pytest.approx(accuracy(likelihoods, [gold for _, _, gold in asked])), task


def test_a_single_item_has_no_standard_error(sharp, data):
    [score] = evaluate_tasks(sharp, byte_tokenizer(), ["piqa"], data=data, limit=1)
    assert (score.items, score.acc_stderr, score.acc_norm_stderr) == (1, None, None)
    assert TaskScore.from_dict(score.to_dict()) == score


def test_averages(scores):
    acc, acc_norm = averages(scores.values())
    assert acc == pytest.approx(sum(score.acc for score in scores.values()) / 7)
    best = [score.acc if score.acc_norm is None else score.acc_norm for score in scores.values()]
    assert acc_norm == pytest.approx(sum(best) / 7)


def test_limit_progress_and_small_batches(sharp, data, monkeypatch):
    seen: list[tuple[int, int]] = []
    options = {"data": data, "limit": 4}
    whole = evaluate_tasks(
        sharp, byte_tokenizer(), ["arc_easy", "piqa"], **options, on_request=lambda *n: seen.append(n)
    )
    assert seen == [(done, 26) for done in range(1, 27)]  # 5 + 4 + 5 + 4 answers, and 4 times two
    assert [score.items for score in whole] == [4, 4]
    monkeypatch.setattr(likelihood, "TOKENS", 100)  # a few questions or answers at a time
    assert evaluate_tasks(sharp, byte_tokenizer(), ["arc_easy", "piqa"], **options) == whole


def test_the_harness_scores_models_with_a_state(sharp, data, scores, monkeypatch):
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(type(sharp), "_is_stateful", True)
    [score] = evaluate_tasks(sharp, byte_tokenizer(), ["arc_easy"], data=data, on_request=lambda *n: seen.append(n))
    assert score == scores["arc_easy"]
    assert seen[-1] == (45, 45)


def test_a_packed_model(data):
    packed = pack_randomly(tiny_llama(max_position_embeddings=2048))
    [score] = evaluate_tasks(packed, byte_tokenizer(), ["piqa"], data=data)
    asked = [(f"Question: {i['goal']}\nAnswer:", [i["sol1"], i["sol2"]]) for i in items(data, "piqa/valid.jsonl")]
    likelihoods = [[log_likelihood(packed, text, f" {c}") for c in choices] for text, choices in asked]
    assert score.acc == pytest.approx(accuracy(likelihoods, [0, 1, 1, 0, 1, 0, 1, 1]))


def test_the_definitions_fit_the_real_files():
    folder = needs("qa")
    model = tiny_llama(max_position_embeddings=8192, num_hidden_layers=1)
    scores = evaluate_tasks(model, byte_tokenizer(), TASKS, data=folder, limit=2)
    assert [score.task for score in scores] == list(TASKS)
    assert all(score.items == 2 for score in scores)


def test_unusable_tasks_and_files(sharp, data, tmp_path):
    def fail(tasks, folder, **options):
        evaluate_tasks(sharp, byte_tokenizer(), tasks, data=folder, **options)

    with pytest.raises(ConfigError, match=r"'riddles' is unknown.*arc_easy"):
        fail(["riddles"], data)
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        fail(["piqa"], data, limit=0)
    with pytest.raises(TextError, match=r"piqa/valid.jsonl is missing; --task-data"):
        fail(["piqa"], tmp_path)
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "valid.jsonl").write_text('{"goal": "x", "sol1": "y", "sol2": "z"}\n')
    (tmp_path / "piqa" / "valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(TextError, match="different lengths"):
        fail(["piqa"], tmp_path)
    (tmp_path / "piqa" / "valid-labels.lst").write_text("zero\n")
    with pytest.raises(TextError, match=r"valid-labels.lst: line 1"):
        fail(["piqa"], tmp_path)


def test_rows_may_hold_what_ends_lines_elsewhere(tmp_path):
    rows = [{"question": "one\u2028two\x85three"}, {"question": "four"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert list(tasks._rows(file)) == rows


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("piqaa", "'piqaa' is unknown to lm-evaluation-harness; is piqa"),
        ("ai2_arc", "ai2_arc is a group of tasks; name those that are wanted: arc_challenge, arc_easy"),
        ("mmlu", "mmlu is a group of tasks"),
        ("gsm8k", "gsm8k wants text to be written"),
    ],
)
def test_names_of_the_harness_are_checked_before_any_work(monkeypatch, name, said):
    monkeypatch.setattr(tasks, "hub_is_reachable", lambda: True)
    check_tasks(("piqa", "arc_easy"), None, None)
    with pytest.raises(ConfigError, match=said):
        check_tasks(("piqa", name), None, None)


def test_data_sets_that_were_fetched_will_do(monkeypatch):
    monkeypatch.setattr(tasks, "hub_is_reachable", lambda: False)
    with pytest.raises(TextError, match="the hub cannot be reached"):
        check_tasks(("piqa",), None, None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_tasks(("piqa",), None, None)


def test_every_definition_is_zero_shot_multiple_choice(tmp_path):
    for task in TASKS:
        values = definition(task, tmp_path)
        assert values["task"] == task
        assert values["output_type"] == "multiple_choice"
        assert yaml.safe_dump({key: value for key, value in values.items() if key != "custom_dataset"})
