"""The plan: same prompts for every variant, keys that change with what could change an answer, checks before work."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from harness import served, taskset
from harness.config import Config
from harness.docs import EXCERPT, excerpts
from harness.engine import ModelFacts, Reply, Request, Result, ToolCall, Usage
from harness.errors import HarnessError
from harness.plan import Plan, make_plan, record_of
from harness.record import PlannedItem
from harness.render import needle_span
from harness.scripted import ByteEncoding
from tests.harness.made_up import write_tasks

THOUGHT_END = 255  # no byte of any UTF-8 text


class ThinkingBytes(ByteEncoding):
    """Bytes of a model that has a thinking switch and tools of its own."""

    fingerprint = "thinking-bytes"
    has_thinking_switch = True
    has_native_tools = True
    think_end_id = THOUGHT_END
    eos_ids = (254,)

    def decode(self, ids: Sequence[int]) -> str:
        if list(ids) == [THOUGHT_END]:
            return "</think>"
        return super().decode(ids)

    def render(self, messages, tools=None, thinking=False, prefix=""):
        assert not (thinking and prefix), "a thought leaves no room for a start of the answer"
        names = "".join(tool["function"]["name"] for tool in tools or ())
        return f"[{names}]" + super().render(messages, None, thinking, prefix)

    def parse(self, ids: Sequence[int], thinking: bool) -> Reply:
        tokens = [i for i in ids if i not in self.eos_ids]
        cut = thinking and THOUGHT_END not in tokens
        end = tokens.index(THOUGHT_END) if THOUGHT_END in tokens else None
        content = "" if cut else self.decode(tokens[(end + 1) if end is not None else 0 :])
        calls = (ToolCall(name="paint", arguments={"é": 1}),) if content == "CALL" else ()
        return Reply(
            reasoning="",
            content=content,
            tool_calls=calls,
            reasoning_tokens=len(tokens) if cut else end or 0,
            truncated_thought=cut,
            malformed=None,
        )


@pytest.fixture(autouse=True)
def local_model(tmp_path, monkeypatch) -> SimpleNamespace:
    """Local models are answered for by this object: facts per path, one encoding."""
    monkeypatch.setattr(taskset, "TASKS", write_tasks(tmp_path))
    world = SimpleNamespace(
        facts={}, context=4_000, selectors=("oracle", "recency", "random"), encoding=ThinkingBytes(), scripts={}
    )

    def facts(choice: Any, device: str, *, fast: bool) -> ModelFacts:
        if not hasattr(choice, "path"):
            return ModelFacts(fingerprint=f"other-{choice}", context_length=None)
        return ModelFacts(fingerprint=f"weights-{choice.path}", context_length=world.context, selectors=world.selectors)

    monkeypatch.setattr(served, "describe_model", facts)
    monkeypatch.setattr(
        served, "open_encoding", lambda choice: world.encoding if hasattr(choice, "path") else ByteEncoding()
    )
    return world


def planned(**changes: Any) -> Plan:
    limit = changes.pop("limit", None)
    raw = {
        "name": "t",
        "model": {"path": "m"},
        "variants": {"dense": {"topk": None}, "sparse": {"topk": 4, "selector": "recency"}},
        "tasks": [{"task": "words", "samples": 1}],
    }
    return make_plan(Config.model_validate(raw | changes), limit=limit)


def item_of(plan: Plan, variant: str = "dense", index: int = 0) -> PlannedItem:
    return [item for item in plan.items if item.variant == variant][index]


def result(request: Request, ids: Sequence[int] = (), **changes: Any) -> Result:
    fields = {
        "id": request.id,
        "token_ids": tuple(ids),
        "text": bytes(i for i in ids if i < 254).decode(errors="replace"),
        "finish_reason": "stop",
        "usage": Usage(prompt_tokens=1, completion_tokens=len(ids)),
    }
    return Result(**fields | changes)


def test_variants_share_prompts_seeds_and_hashes_but_not_keys():
    plan = planned()
    dense, sparse = item_of(plan, "dense"), item_of(plan, "sparse")
    assert dense.requests[0].token_ids is sparse.requests[0].token_ids
    assert dense.requests[0].seed == sparse.requests[0].seed
    assert (dense.prompt_hash, dense.doc_hash) == (sparse.prompt_hash, sparse.doc_hash)
    assert dense.key != sparse.key


def test_the_prompt_is_the_rendered_chat_with_the_start_of_the_answer():
    request = item_of(planned()).requests[0]
    assert bytes(request.token_ids).decode().startswith("[]user:\n")
    assert bytes(request.token_ids).decode().endswith("assistant:\nThe word is")
    assert (request.max_tokens, request.stop, request.thinking) == (8, (".",), False)


def test_generated_prompts_meet_their_length_with_template_and_answer_budget():
    item = item_of(planned(tasks=[{"task": "words", "lengths": [300], "samples": 1}]))
    assert 300 <= item.prompt_tokens + item.max_tokens <= 320  # one step of filler and the question


def test_request_ids_name_the_item_and_the_place():
    item = item_of(planned())
    assert item.requests[0].id == f"{item.key}/0"


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"path": "other"}},
        {"seed": 1},
        {"variants": {"dense": {"topk": 8}}},
        {"variants": {"dense": {"topk": None, "cache_dtype": "fp8"}}},
        {"tasks": [{"task": "words", "samples": 1, "lengths": [210]}]},
        {"tasks": [{"task": "words", "samples": 1, "generation": {"max_tokens": 9}}]},
        {"tasks": [{"task": "words", "samples": 1, "generation": {"stop": ["!"]}}]},
        {"tasks": [{"task": "words", "samples": 1, "thinking": True}]},
        {"tasks": [{"task": "words", "samples": 1, "name": "again"}]},
        {"recall": {"queries": 4, "ks": [2]}},
    ],
)
def test_the_key_changes_with_what_may_change_an_answer_or_what_is_measured(changes, local_model):
    local_model.selectors = ("indexer", "oracle")
    variants = {"variants": {"dense": {"topk": None}}}
    assert item_of(planned(**variants)).key != item_of(planned(**variants | changes)).key


def test_the_key_stays_when_the_suite_grows():
    few = {item.key for item in planned(tasks=[{"task": "words", "samples": 1}]).items}
    more = planned(tasks=[{"task": "colours", "samples": 2}, {"task": "words", "samples": 3, "lengths": [200, 210]}])
    assert few < {item.key for item in more.items}


def test_the_arithmetic_of_the_model_is_in_the_key(monkeypatch):
    before = item_of(planned()).key
    other = ModelFacts(fingerprint="weights-m", context_length=4000, numerics="2")
    monkeypatch.setattr(served, "describe_model", lambda choice, device, *, fast: other)
    assert item_of(planned()).key != before


def test_repeats_have_own_keys_and_seeds():
    plan = planned(tasks=[{"task": "colours", "samples": 1, "repeats": 3, "thinking": False}])
    items = [item for item in plan.items if item.variant == "dense"]
    assert [item.repeat for item in items] == [0, 1, 2]
    assert len({item.key for item in items}) == len({item.requests[0].seed for item in items}) == 3
    assert len({item.prompt_hash for item in items}) == 1


def test_stored_docs_list_every_key_and_leave_out_what_is_too_large():
    plan = planned(tasks=[{"task": "words", "samples": 2}])
    first, second = plan.docs["words"]
    assert [first["doc_id"], second["doc_id"]] == ["200/0", "200/1"]
    assert first["keys"] == {"dense": [item_of(plan).key], "sparse": [item_of(plan, "sparse").key]}
    assert "prompt" not in first["doc"] and first["target"] == "w0"
    assert first["group"] == {"length": 200} and first["doc_hash"] == item_of(plan).doc_hash


def test_limit_takes_the_first_docs_of_every_task():
    plan = planned(tasks=[{"task": "words", "lengths": [150, 200]}, {"task": "colours"}], limit=2)
    assert {task: len(lines) for task, lines in plan.docs.items()} == {"words": 2, "colours": 2}


def test_needle_spans_hold_the_needle_after_tokenisation():
    plan = planned(recall={"queries": 4, "ks": [2]})
    request = item_of(plan).requests[0]
    ((start, end),) = request.probes.needles
    assert bytes(request.token_ids[start:end]).decode() == "The word of 0-200-0 is w0."


def test_a_needle_that_the_tokenizer_garbles_stops_the_plan(local_model):
    local_model.encoding.decode = lambda ids: ThinkingBytes().decode(ids).replace("w0", "w8")
    with pytest.raises(HarnessError, match=r"tasks.0 \(words\), doc 200/0: the needle .* is not in the prompt after"):
        planned()


def test_a_needle_must_be_in_the_prompt_once():
    text = "one two one"
    ids, offsets = ByteEncoding().encode_with_offsets(text)
    assert needle_span("two", text, ids, offsets, ByteEncoding()) == (4, 7)
    with pytest.raises(HarnessError, match="'one' is 2 times in the prompt; expected once"):
        needle_span("one", text, ids, offsets, ByteEncoding())


def test_a_needle_of_many_bytes_is_found_by_characters():
    text = "ü → the nëedle ←"
    ids, offsets = ByteEncoding().encode_with_offsets(text)
    start, end = needle_span("nëedle", text, ids, offsets, ByteEncoding())
    assert bytes(ids[start:end]).decode() == "nëedle"


def test_a_prompt_that_does_not_fit_is_refused_with_numbers_and_cure(local_model):
    local_model.context = 150
    with pytest.raises(HarnessError) as caught:
        planned()
    message = str(caught.value)
    assert message.startswith("tasks.0 (words), doc 200/0: ")
    assert "prompt and 8 answer tokens do not fit the context of 150: set a lower generation.max_tokens" in message


def test_a_prompt_that_just_fits_is_taken(local_model):
    tokens = item_of(planned()).prompt_tokens
    local_model.context = tokens + 8
    assert planned().items
    local_model.context = tokens + 7
    with pytest.raises(HarnessError, match="do not fit"):
        planned()


def test_dense_is_probed_with_every_selector_and_k_and_sparse_with_its_own():
    plan = planned(recall={"queries": 4, "ks": [2, 8]})
    dense, sparse = item_of(plan, "dense").requests[0].probes, item_of(plan, "sparse").requests[0].probes
    assert (dense.selectors, dense.ks) == (("oracle", "recency", "random"), (2, 8))
    assert (sparse.selectors, sparse.ks) == (("recency",), (4,))
    assert plan.probed == {"dense", "sparse"}


def test_recall_may_name_its_selectors():
    plan = planned(recall={"queries": 4, "ks": [2], "selectors": ["oracle"]})
    assert item_of(plan, "dense").requests[0].probes.selectors == ("oracle",)


def test_nothing_is_probed_without_recall_or_behind_an_endpoint():
    assert planned().probed == frozenset()
    endpoint = {"model": {"endpoint": "http://h", "name": "n"}, "variants": {"dense": {}}}
    assert planned(**endpoint, recall={"queries": 1, "ks": [1]}, tasks=[{"task": "colours"}]).probed == frozenset()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"a": {"topk": 4}}}, "variants.a.selector: this model cannot serve 'indexer'"),
        ({"recall": {"queries": 1, "ks": [1], "selectors": ["oracle", "indexer"]}}, "recall.selectors.1: the model of"),
        (
            {"compare": {"baseline": "dense", "margin": {"word": 0.1}}},
            "compare.margin.word: not a task of this config;",
        ),
        ({"tasks": [{"task": "wrds"}]}, "tasks.0.task: unknown task 'wrds'; the nearest is 'words'"),
    ],
)
def test_what_the_model_or_the_suite_lacks_is_refused(changes, message):
    with pytest.raises(HarnessError) as caught:
        planned(**changes)
    assert str(caught.value).startswith(message)


def test_thinking_is_the_protocols_word_unless_model_or_entry_say_otherwise():
    def thinks(model: dict[str, Any], **entry: Any) -> bool:
        plan = planned(model={"path": "m", **model}, tasks=[{"task": "colours", "samples": 1, **entry}])
        request = item_of(plan).requests[0]
        assert bytes(request.token_ids).endswith(b"<think>") == request.thinking
        return request.thinking

    assert thinks({})
    assert not thinks({"thinking": False})
    assert thinks({"thinking": False}, thinking=True)
    assert not thinks({}, thinking=False)


def test_a_thought_takes_the_place_of_the_start_of_the_answer():
    request = item_of(planned(tasks=[{"task": "words", "samples": 1, "thinking": True}])).requests[0]
    assert bytes(request.token_ids).endswith(b"assistant:\n<think>")


def test_a_model_that_always_thinks_is_known_by_its_prompt(local_model):
    class AlwaysThinks(ThinkingBytes):
        has_thinking_switch = False

        def render(self, messages, tools=None, thinking=False, prefix=""):
            return super().render(messages, tools) + "<think>\n"

    local_model.encoding = AlwaysThinks()
    assert item_of(planned()).requests[0].thinking


def test_thinking_is_refused_where_there_is_no_switch(local_model):
    local_model.encoding = ByteEncoding()
    with pytest.raises(HarnessError, match=r"tasks.0.thinking: the model has no thinking switch"):
        planned(tasks=[{"task": "words", "thinking": True}])
    assert not item_of(planned(tasks=[{"task": "colours"}])).requests[0].thinking


def test_native_tools_go_into_the_prompt_or_are_refused(local_model):
    tasks = [{"task": "colours_native", "samples": 1}]
    request = item_of(planned(tasks=tasks)).requests[0]
    assert bytes(request.token_ids).startswith(b"[paint]") and request.tools[0]["function"]["name"] == "paint"
    local_model.encoding = ByteEncoding()
    with pytest.raises(HarnessError, match="the model has no tool format of its own; use the prompting mode"):
        planned(tasks=tasks)


def test_an_endpoint_gets_messages_and_the_start_of_the_answer_as_one():
    endpoint = {"model": {"endpoint": "http://h", "name": "n"}, "variants": {"a": {}}}
    request = item_of(planned(**endpoint, tasks=[{"task": "colours", "samples": 1}]), "a").requests[0]
    assert [message["role"] for message in request.messages] == ["user"]
    with pytest.raises(HarnessError, match=r"model\.tokenizer: words makes prompts of given lengths"):
        planned(**endpoint)


@pytest.mark.parametrize(("script", "reply"), [("gold", "w0"), ("wrong", "w999"), ("empty", "")])
def test_scripts_carry_their_reply(script, reply):
    plan = planned(model={"scripted": script}, variants={"a": {}})
    assert item_of(plan, "a").requests[0].reply == reply


def test_a_lowered_budget_is_listed():
    plan = planned(tasks=[{"task": "words", "generation": {"max_tokens": 4}}, {"task": "colours"}])
    assert plan.lowered == {"words"}


def test_variants_with_other_weights_share_prompts_where_the_encoding_is_the_same():
    variants = {"a": {"topk": None}, "b": {"topk": None, "model": {"path": "other"}}}
    plan = planned(variants=variants)
    assert item_of(plan, "a").prompt_hash == item_of(plan, "b").prompt_hash
    assert plan.fingerprints == {"a": "weights-m", "b": "weights-other"}


def test_a_record_takes_the_answer_behind_the_thought_by_token_ids():
    item = item_of(planned(tasks=[{"task": "colours", "samples": 1}]))
    ids = [*b"red </think> or", THOUGHT_END, *b"blue", 254]
    record = record_of(item, [result(item.requests[0], ids)], ThinkingBytes())
    (response,) = record.responses
    assert (response.answer, response.reasoning_tokens, response.truncated_thought) == ("blue", 15, False)
    assert (record.key, record.error, record.max_tokens) == (item.key, None, 16)


def test_a_thought_that_was_cut_off_is_no_answer():
    item = item_of(planned(tasks=[{"task": "colours", "samples": 1}]))
    answer = result(item.requests[0], list(b"blue"), finish_reason="length")
    (response,) = record_of(item, [answer], ThinkingBytes()).responses
    assert (response.answer, response.truncated_thought, response.text) == ("", True, "blue")


def test_an_answer_ends_before_the_first_stop_string():
    item = item_of(planned())
    (response,) = record_of(item, [result(item.requests[0], list(b" w0. And. More"))], ThinkingBytes()).responses
    assert response.answer == " w0"


def test_native_calls_become_json():
    item = item_of(planned(tasks=[{"task": "colours_native", "samples": 1, "thinking": False}]))
    (response,) = record_of(item, [result(item.requests[0], list(b"CALL"))], ThinkingBytes()).responses
    assert response.answer == '[{"name": "paint", "arguments": {"é": 1}}]'


def test_text_without_ids_is_read_as_text():
    item = item_of(planned())
    (response,) = record_of(item, [result(item.requests[0], text="w0")], ThinkingBytes()).responses
    assert response.answer == "w0"


def test_an_error_has_no_responses():
    item = item_of(planned())
    failed = result(item.requests[0], finish_reason="error", error="out of memory")
    record = record_of(item, [failed], ThinkingBytes())
    assert (record.responses, record.error, record.recall) == ((), "out of memory", None)


def test_excerpts_show_head_needle_and_tail_of_a_long_prompt():
    prompt = "a" * 5_000 + "needle" + "b" * 5_000
    shown = excerpts(prompt, ["needle"])
    assert shown["head"] == "a" * EXCERPT and shown["tail"] == "b" * EXCERPT
    assert "needle" in shown["needle"] and len(shown["needle"]) == EXCERPT
    assert shown["needle"].startswith("a") and shown["needle"].endswith("b")


def test_excerpts_of_a_short_prompt_do_not_repeat_it():
    assert excerpts("short", []) == {"head": "short", "needle": None, "tail": ""}
    middling = "x" * EXCERPT + "y" * 10
    assert excerpts(middling, []) == {"head": "x" * EXCERPT, "needle": None, "tail": "y" * 10}
