"""The endpoint engine against a server on this machine: what is sent, what comes back, what is tried again."""

import json
from typing import Any

import pytest

from harness.endpoint import EndpointEngine
from harness.engine import Request, Result, Sampling
from harness.errors import HarnessError
from harness.scripted import ByteEncoding
from tests.harness.chat_server import ChatServer, completion

QUESTION = ({"role": "user", "content": "2 + 2?"},)


def request(name: str = "a", **changes: Any) -> Request:
    fields: dict[str, Any] = {"messages": QUESTION, "max_tokens": 32} | changes
    return Request(id=name, variant="v", token_ids=(1, 2), **fields)


def ask(server: ChatServer, *requests: Request, **options: Any) -> dict[str, Result]:
    engine = EndpointEngine(server.url, "tiny", **({"max_retries": 0, "timeout_seconds": 10.0} | options))
    return {result.id: result for result in engine.run(requests or (request(),))}


def test_prompt_and_settings_reach_the_server_and_nothing_else(server: ChatServer) -> None:
    tools = ({"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}},)
    sampling = Sampling(temperature=0.6, top_p=0.95, top_k=20)
    ask(server, request(tools=tools, sampling=sampling, seed=7, stop=("\n\n",)))
    assert server.bodies == [
        {
            "model": "tiny",
            "messages": list(QUESTION),
            "tools": list(tools),
            "max_tokens": 32,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "seed": 7,
            "stop": ["\n\n"],
        }
    ]


def test_text_usage_and_finish_reason_come_back(server: ChatServer) -> None:
    server.reply = lambda body: (200, completion("4, of course", finish_reason="length"))
    result = ask(server)["a"]
    assert (result.text, result.finish_reason, result.error) == ("4, of course", "length", None)
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (11, 5)
    assert result.seconds > 0


def test_reasoning_tokens_are_taken_where_the_server_counts_them(server: ChatServer) -> None:
    counted = completion("4", reasoning_content="two and two")
    counted["usage"]["completion_tokens_details"] = {"reasoning_tokens": 3}
    server.reply = lambda body: (200, counted)
    assert ask(server)["a"].usage.reasoning_tokens == 3
    server.reply = lambda body: (200, completion("4"))
    assert ask(server)["a"].usage.reasoning_tokens is None


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_thought_is_kept_apart_from_the_answer(server: ChatServer, field: str) -> None:
    server.reply = lambda body: (200, completion("4", **{field: "two and two"}))
    reply = ByteEncoding().parse(ask(server)["a"].text.encode(), thinking=False)
    assert (reply.reasoning, reply.content, reply.truncated_thought) == ("two and two", "4", False)


def test_a_thought_that_was_cut_off_is_no_answer(server: ChatServer) -> None:
    server.reply = lambda body: (200, completion(None, finish_reason="length", reasoning_content="maybe 5, or"))
    reply = ByteEncoding().parse(ask(server)["a"].text.encode(), thinking=False)
    assert (reply.content, reply.truncated_thought) == ("", True)


def test_a_server_that_hides_the_thought_has_its_answer_read(server: ChatServer) -> None:
    server.reply = lambda body: (200, completion("4"))
    text = ask(server, request(thinking=True))["a"].text
    reply = ByteEncoding().parse(text.encode(), thinking=True)
    assert (reply.content, reply.truncated_thought) == ("4", False)


def test_stop_strings_are_not_looked_for_inside_a_thought(server: ChatServer) -> None:
    server.reply = lambda body: (200, completion("So:\n\n4", reasoning_content="first\n\nsecond"))
    result = ask(server, request(thinking=True, stop=("\n\n",)))["a"]
    assert "stop" not in server.bodies[0]
    assert result.text == "<think>first\n\nsecond</think>So:"


def test_more_stop_strings_than_the_api_takes_still_end_the_answer(server: ChatServer) -> None:
    server.reply = lambda body: (200, completion("one five two"))
    result = ask(server, request(stop=("1", "2", "3", "4", " five")))["a"]
    assert (server.bodies[0]["stop"], result.text) == (["1", "2", "3", "4"], "one")


def test_tool_calls_become_a_json_list_of_names_and_arguments(server: ChatServer) -> None:
    function = {"name": "add", "arguments": '{"a": 2, "b": [2]}'}
    server.reply = lambda body: (
        200,
        completion(None, "tool_calls", tool_calls=[{"id": "1", "type": "function", "function": function}]),
    )
    result = ask(server)["a"]
    assert json.loads(result.text) == [{"name": "add", "arguments": {"a": 2, "b": [2]}}]
    assert result.finish_reason == "stop"


def test_several_requests_are_in_flight_but_not_more_than_allowed(server: ChatServer) -> None:
    server.seconds = 0.02
    results = ask(server, *(request(f"r{n}") for n in range(12)), max_in_flight=4)
    assert sorted(results) == sorted(f"r{n}" for n in range(12))
    assert 2 <= server.max_in_flight <= 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: ChatServer, status: int) -> None:
    server.reply = lambda body: (
        (status, {"error": {"message": "busy"}})
        if len(server.bodies) < 2
        else (
            200,
            completion("at last"),
        )
    )
    assert ask(server, max_retries=3)["a"].text == "at last"
    assert len(server.bodies) == 2


def test_a_refused_sample_is_an_error_and_the_others_are_not(server: ChatServer) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if body["max_tokens"] == 99:
            return 400, {"error": {"message": "too\nlong"}}
        return 200, completion("fine")

    server.reply = reply
    results = ask(server, request("a"), request("b", max_tokens=99), request("c"))
    assert (results["a"].error, results["c"].error) == (None, None)
    error = results["b"].error or ""
    assert results["b"].finish_reason == "error"
    assert error.startswith("the server answered 400: ") and "long" in error and "\n" not in error
    assert len(server.bodies) == 3


def test_a_server_that_is_not_there_is_an_error_result() -> None:
    engine = EndpointEngine("http://127.0.0.1:9/v1", "tiny", max_retries=0, timeout_seconds=2.0)
    (result,) = engine.run([request()])
    assert result.finish_reason == "error" and result.error == "APIConnectionError: Connection error."


def test_log_likelihoods_are_refused_by_name(server: ChatServer) -> None:
    result = ask(server, request(continuation=(5,)))["a"]
    assert result.error is not None and "no log-likelihoods" in result.error
    assert server.bodies == []


def test_the_key_comes_from_the_environment(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", "s3cret")
    ask(server, key_env="TINY_KEY")
    assert server.headers[0]["authorization"] == "Bearer s3cret"
    monkeypatch.delenv("TINY_KEY")
    with pytest.raises(HarnessError, match="expected the key in the environment variable TINY_KEY"):
        EndpointEngine(server.url, "tiny", key_env="TINY_KEY")
