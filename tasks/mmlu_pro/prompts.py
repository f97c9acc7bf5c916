"""The two prompts: official five-shot chain of thought, and zero-shot chat.

Sources: TIGER-AI-Lab/MMLU-Pro at f418b116, evaluate_from_local.py with cot_prompt_lib/initial_prompt.txt;
openai/simple-evals, common.py, QUERY_TEMPLATE_MULTICHOICE with ten letters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.metrics.mmlu_pro_answer import LETTERS

_INSTRUCTION = (
    "The following are multiple choice questions (with answers) about {category}. Think step by step and then finish "
    'your answer with "the answer is (X)" where X is the correct letter choice.'
)
_CHAT_INSTRUCTION = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCDEFGHIJ. Think step by step before answering."
)


def few_shot_prompt(item: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    """Instruction, the worked examples in the given order, the question and the start of its answer."""
    # the instruction file ends with three line ends and the script adds one
    head = _INSTRUCTION.format(category=item["category"]) + "\n\n\n\n"
    shots = "".join(_question(example) + _worked_answer(example) + "\n\n" for example in examples)
    return head + shots + _question(item) + "Answer: Let's think step by step."


def chat_prompt(item: Mapping[str, Any]) -> str:
    """One user turn without examples."""
    options = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, item["options"], strict=False))
    return f"{_CHAT_INSTRUCTION}\n\n{item['question']}\n\n{options}"


def _question(item: Mapping[str, Any]) -> str:
    options = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, item["options"], strict=False))
    return f"Question:\n{item['question']}\nOptions:\n{options}"


def _worked_answer(example: Mapping[str, Any]) -> str:
    text: str = example["cot_content"]
    return text.replace("A: Let's think step by step.", "Answer: Let's think step by step.")
