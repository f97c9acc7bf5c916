"""What the model reads: BFCL's system prompt with the functions as JSON, or native tools.

Source of the fixed texts: bfcl-eval 2026.3.23, `constants/default_prompts.py` (its default: style "classic", format
"plaintext", Python calls, functions as JSON), `utils.py` for the hints on Java and JavaScript, `model_handler/utils.py`
for tools.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any

from tasks.tool_use.checker import language_of, offered_name

# the missing blank after the first sentence and the double one before "You SHOULD NOT" are the protocol's
_SYSTEM_PROMPT = (
    "You are an expert in composing functions."
    "You are given a question and a set of possible functions. Based on the question, you will need to make one or "
    "more function/tool calls to achieve the purpose. If none of the functions can be used, point it out. If the given "
    "question lacks the parameters required by the function, also point it out.\n\n"
    "You should only return the function calls in your response.\n\n"
    "If you decide to invoke any of the function(s), you MUST put it in the format of "
    "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)].  "
    "You SHOULD NOT include any other text in the response.\n\n"
    "At each turn, you should try your best to complete the tasks requested by the user within the current turn. "
    "Continue to output functions to call until you have fulfilled the user's request to the best of your ability. "
    "Once you have no more functions to call, the system will consider the current turn complete and proceed to the "
    "next turn or task.\n\n"
    "Here is a list of functions in json format that you can invoke.\n{functions}\n"
)
_LANGUAGE_HINTS = {"python": "Python 3", "java": "Java 8 SDK", "javascript": "JavaScript"}
_LANGUAGE_NAMES = {"java": "Java", "javascript": "JavaScript"}
_JSON_SCHEMA_TYPES = {
    **dict.fromkeys(("integer", "byte", "short", "long", "Bigint"), "integer"),
    **dict.fromkeys(("number", "float", "double"), "number"),
    **dict.fromkeys(("boolean", "bool"), "boolean"),
    **dict.fromkeys(("array", "list", "tuple", "ArrayList", "Array", "Queue", "Stack"), "array"),
    **dict.fromkeys(("dict", "object", "HashMap", "Hashtable"), "object"),
}


def prompt_messages(
    messages: Sequence[dict[str, str]], functions: Sequence[dict[str, Any]], category: str
) -> list[dict[str, str]]:
    """Chat messages in prompting mode: the item's own system message follows the protocol's, in one message."""
    listed = json.dumps(described_functions(functions, category), indent=4)
    system = _SYSTEM_PROMPT.replace("{functions}", listed)
    rest = list(messages)
    if rest[0]["role"] == "system":
        system = f"{system}\n\n{rest.pop(0)['content']}"
    return [{"role": "system", "content": system}, *rest]


def described_functions(functions: Sequence[dict[str, Any]], category: str) -> list[dict[str, Any]]:
    """Function descriptions as the model sees them: with the language's hint, Java and JavaScript types as text."""
    language = language_of(category)
    described = copy.deepcopy(list(functions))
    for function in described:
        function["description"] += f" Note that the provided function is in {_LANGUAGE_HINTS[language]} syntax."
        if language != "python":
            for schema in function["parameters"]["properties"].values():
                _describe_as_text(schema, _LANGUAGE_NAMES[language])
    return described


def _describe_as_text(schema: dict[str, Any], language: str) -> None:
    """Parameters of the two other languages are strings that hold source text; the real type goes into the words."""
    type_ = schema["type"]
    if type_ == "any":
        words = f" This parameter can be of any type of {language} object in string representation."
    else:
        words = f" This is {language} {type_} type parameter in string representation."
    if type_ in (("ArrayList", "Array") if language == "Java" else ("array",)):
        element = schema.pop("items")["type"]
        words += f" The list elements are of type {element}; they are not in string representation."
    if language == "JavaScript" and type_ == "dict" and "properties" in schema:
        entries = json.dumps(schema.pop("properties"))
        words += f" The dictionary entries have the following schema; they are not in string representation. {entries}"
    schema["description"] += words
    schema["type"] = "string"


def native_tools(functions: Sequence[dict[str, Any]], category: str) -> list[dict[str, Any]]:
    """The functions as OpenAI tools: JSON-schema types, "_" for "." in names."""
    tools = described_functions(functions, category)
    for function in tools:
        function["name"] = offered_name(function["name"], underscores=True)
        function["parameters"]["type"] = "object"
        _cast_properties(function["parameters"]["properties"])
    return [{"type": "function", "function": function} for function in tools]


def _cast_properties(properties: dict[str, Any]) -> None:
    """BFCL's types to JSON schema's, in the nested places that the official conversion reaches."""
    for schema in properties.values():
        if schema.get("type") == "float":
            schema["format"] = "float"
            schema["description"] = schema.get("description", "") + " This is a float type value."
        schema["type"] = _json_type(schema)
        if schema["type"] not in ("array", "object"):
            continue
        if "properties" in schema:
            _cast_properties(schema["properties"])
        elif "items" in schema:
            items = schema["items"]
            items["type"] = _json_type(items)
            if items["type"] == "array" and "items" in items:
                items["items"]["type"] = _json_type(items["items"])
            elif items["type"] == "object" and "properties" in items:
                _cast_properties(items["properties"])


def _json_type(schema: dict[str, Any]) -> str:
    return _JSON_SCHEMA_TYPES.get(schema.get("type", ""), "string")
