import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evaluate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.metrics.boxed_answer import boxed_content, judge, normal_form
from tasks.metrics.math_equivalence import Worker, equivalent
from tasks.metrics.mmlu_pro_answer import LETTERS, chat_answer, official_answer, random_guess

METRICS = Path(__file__).resolve().parents[2] / "tasks" / "metrics"
CASES = Path(__file__).parent / "cases"
LETTER_CASES = json.loads((CASES / "mmlu_pro_answer.json").read_text())
BOX_CASES = json.loads((CASES / "boxed_answer.json").read_text())


@pytest.mark.parametrize("case", LETTER_CASES, ids=lambda case: f"{case['style']}: {case['name']}")
def test_letter_is_the_one_of_the_golden_case(case):
    extract = {"official": official_answer, "chat": chat_answer}[case["style"]]
    assert extract(case["text"]) == case["expected"]


def test_first_step_agrees_with_the_regex_filter_of_lm_eval_wherever_that_finds_a_letter():
    from lm_eval.filters.extraction import RegexFilter

    texts = [case["text"] for case in LETTER_CASES]
    theirs = RegexFilter(r"answer is \(?([ABCDEFGHIJ])\)?").apply([[text] for text in texts], [{} for _ in texts])
    found = [(text, letters[0]) for text, letters in zip(texts, theirs, strict=True) if letters[0] != "[invalid]"]
    assert len(found) >= 5
    for text, letter in found:
        assert official_answer(text) == letter


OFFICIAL_STEPS = (  # as written in evaluate_from_local.py
    r"answer is \(?([A-J])\)?",
    r".*[aA]nswer:\s*([A-J])",
    r"(?s)(\b[A-J]\b)(?!.*\b[A-J]\b)",
)
PIECES = ["answer is ", "Answer:", "answer: ", "(", ")", "A", "B", "c", "J", "K", "\n", " ", "I am ", "The "]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_letter_is_the_one_of_the_official_patterns(text):
    found = [match[1] for match in (re.search(step, text) for step in OFFICIAL_STEPS) if match]
    assert official_answer(text) == (found[0] if found else None)


@pytest.mark.parametrize(
    "text",
    ["x" * 300_000, "A " * 100_000 + "x" * 100_000, "Answer: " * 40_000, "answer is (" * 30_000],
    ids=["one long line", "letters and a long tail", "label without a letter", "phrase without a letter"],
)
def test_letter_of_a_degenerate_response_is_found_in_linear_time(text):
    start = time.process_time()
    official_answer(text)
    chat_answer(text)
    assert time.process_time() - start < 1  # seconds; quadratic patterns take minutes


@pytest.mark.parametrize(
    "text",
    ["\\boxed{" * 40_000, "\\boxed{" * 40_000 + "1" + "}" * 40_000, "\\boxed " * 40_000, "\\boxed{" + "{" * 100_000],
    ids=["never closed", "all closed", "without braces", "braces in a box"],
)
def test_box_of_a_degenerate_response_is_judged_in_linear_time(text):
    start = time.process_time()
    judge(text, "33")
    assert time.process_time() - start < 2


def test_box_that_is_far_too_long_is_an_answer_and_wrong():
    verdict = judge("\\boxed{" + "3" * 5000 + "}", "3" * 5000)
    assert not verdict.correct and len(verdict.answer) == 2000


def test_random_guess_depends_on_the_question_only_and_covers_the_options():
    ids = [str(number) for number in range(4000)]
    guesses = [random_guess(name, 4) for name in ids]
    assert guesses == [random_guess(name, 4) for name in reversed(ids)][::-1]
    for letter in "ABCD":
        assert guesses.count(letter) / len(ids) == pytest.approx(0.25, abs=0.04)  # five standard errors
    assert {random_guess(name, 10) for name in ids} == set(LETTERS)


@pytest.mark.parametrize("case", BOX_CASES, ids=lambda case: case["name"])
def test_boxed_answer_is_judged_as_in_the_golden_case(case):
    verdict = judge(case["text"], case["gold"])
    assert (verdict.answer, verdict.correct) == (case["answer"], case["correct"])
    assert verdict.by_math_verify == case["math_verify_only"]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="\\{}[]()$,.=^_ 0123456789abcdfortx+-/!", max_size=60))
def test_any_text_can_be_boxed_and_normalised(text):
    form = normal_form(text)
    assert isinstance(form, str)
    content = boxed_content(f"\\boxed{{{text}}}")
    assert content is None or len(content) <= len(text)


@settings(max_examples=100, deadline=None)
@given(st.integers(min_value=-(10**12), max_value=10**12), st.integers(min_value=0, max_value=5))
def test_integer_keeps_its_value_through_zeros_and_separators(number, zeros):
    sign = "-" if number < 0 else ""
    assert normal_form(f"{sign}{'0' * zeros}{abs(number)}") == str(number)
    assert normal_form(f"{number:,}") == str(number)
    assert normal_form(f"{number:,}".replace(",", "{,}")) == str(number)


def test_math_verify_works_in_threads():
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(equivalent, [r"\frac{1}{2}"] * 8, [f"\\frac{{{n}}}{{8}}" for n in range(8)]))
    assert verdicts == [n == 4 for n in range(8)]


@pytest.mark.parametrize("bomb", ["9^{9^{9}}", "10^{10}!"])
def test_answer_that_would_take_forever_is_different_and_the_next_one_is_judged(bomb):
    worker = Worker(max_cpu_seconds=1)
    assert worker.ask("33", bomb) is False
    assert worker.ask("33", r"\frac{66}{2}") is True
    worker.close()


def test_boxed_answer_loads_alone_by_path():
    metric = evaluate.load(str(METRICS / "boxed_answer_metric.py"))
    scores = metric.compute(predictions=[r"\boxed{033}", r"\boxed{\frac{66}{2}}", "33"], references=["33"] * 3)
    assert scores == pytest.approx({"exact_match": 2 / 3, "math_verify_only": 1 / 3, "parsed": 2 / 3})


def test_mmlu_pro_answer_loads_alone_by_path():
    metric = evaluate.load(str(METRICS / "mmlu_pro_answer_metric.py"))
    texts, references = ["The answer is (B).", "no idea"], ["B", "C"]
    assert metric.compute(predictions=texts, references=references) == {"exact_match": 0.5, "parsed": 0.5}
    assert metric.compute(predictions=texts, references=references, chat=True) == {"exact_match": 0.0, "parsed": 0.0}
