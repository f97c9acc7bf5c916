"""The official checker's outcomes, recorded case by case on made-up functions."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.tool_use.calls import canonical
from tasks.tool_use.decode_java import decode_java
from tasks.tool_use.decode_python import decode_python
from tasks.tool_use.score import score_answer

RECORDED = json.loads((Path(__file__).parent / "tool_use_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
def test_outcome_equals_the_official_checkers(case: dict[str, Any]) -> None:
    item = RECORDED["items"][case["item"]]
    score = score_answer(case["text"], item["functions"], item["answers"] or [], item["category"], case["mode"])
    error = ":".join(part.strip() for part in score.reason.split(":")[:2])
    assert (score.right, score.decoded, error) == (case["right"], case["decoded"], case["error"])


def test_every_rule_has_a_recorded_case() -> None:
    expected = {
        *("ast_decoder:decoder_failed", "ast_decoder:decoder_wrong_output_format"),
        *("irrelevance_error:decoder_success", "relevance_error:decoder_failed"),
        *("multiple_function_checker:wrong_count", "multiple_function_checker:wrong_count"),
        *("parallel_function_checker_no_order:wrong_count", "parallel_function_checker_no_order:cannot_find_match"),
        *("simple_function_checker:wrong_count", "simple_function_checker:wrong_func_name"),
        *("simple_function_checker:missing_required", "simple_function_checker:unexpected_param"),
        *("simple_function_checker:missing_optional", "type_error:simple", "type_error:nested", "type_error:java"),
        *("type_error:js", "value_error:others", "value_error:string", "value_error:list/tuple"),
        *("value_error:dict_key", "value_error:dict_value", "value_error:list_dict_count"),
    }
    assert expected <= {case["error"] for case in RECORDED["cases"]}


def test_no_text_of_the_answer_is_evaluated(tmp_path: Path) -> None:
    target = tmp_path / "made"
    for expression in (f"open({str(target)!r}, 'w') + 1", "__import__('os').getpid() + 1", "len('abc') + 1"):
        score = score_answer(f"[f(a={expression})]", [], [], "irrelevance", "prompting")
        assert not score.decoded
    assert not target.exists()


def test_canonical_text_ignores_the_order_of_arguments_and_calls() -> None:
    first = canonical(decode_python("[g(), f(a=1, b='x')]"))
    second = canonical(decode_python('[f(b="x", a=1), g()]'))
    assert first == second == "[f(a=1, b='x'), g()]"
    assert first != canonical(decode_python("[f(a=1, b='y'), g()]"))


def test_answer_is_none_without_calls_and_no_call_where_that_is_right() -> None:
    item = RECORDED["items"]["tea"]
    assert score_answer("no", item["functions"], item["answers"], "simple_python", "prompting").answer is None
    assert score_answer("[]", item["functions"], item["answers"], "simple_python", "prompting").answer is None
    assert score_answer("no", item["functions"], [], "irrelevance", "prompting").answer == "no call"
    assert score_answer("[f()]", item["functions"], [], "irrelevance", "prompting").answer == "[f()]"


def test_letters_beyond_ascii_stay_whole_in_java() -> None:
    # the official parser cuts text by byte offsets and garbles them: a known difference
    assert decode_java('[Café.open(name="Zoë", table=2)]') == [{"Café.open": {"name": "Zoë", "table": "2"}}]
