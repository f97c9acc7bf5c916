"""A folder of made-up tasks: spelling words (generated, with needles) and picking a colour (a data set)."""

from pathlib import Path

FUNCTIONS = """
import datasets

from tasks.errors import TaskError

COLOURS = ["red", "green", "blue"]


def build_words(seed, data, samples, count_tokens, max_tokens, lengths, **_):
    docs = []
    for length in lengths if isinstance(lengths, list) else [lengths]:
        for index in range(samples or 2):
            needle = f"The word of {seed}-{length}-{index} is w{index}."
            filler = ""
            while count_tokens(filler + " " + needle, "The word is") + max_tokens < length:
                filler += " bla"
            docs.append({"id": f"{length}/{index}", "length": length, "needles": [needle], "word": f"w{index}",
                         "prompt": f"{filler} {needle} Which word?", "haystack": "none"})
    return {"test": datasets.Dataset.from_list(docs)}


def build_colours(data, **_):
    if data == "missing":
        raise TaskError("missing: no such file; expected colours.jsonl")
    number = 0 if data == "empty" else 12
    docs = [{"id": i % (6 if data == "twice" else 99), "hue": COLOURS[i % 3], "kind": "ab"[i % 2]} for i in range(number)]
    return {"test": datasets.Dataset.from_list(docs)}


def words_score(doc, results):
    return {"right": float(doc["word"] in results[0]), "answer": results[0] or None}


def colours_score(doc, results):
    text = results[0].strip()
    if text == "crash":
        raise KeyError(text)
    return {"right": text == doc["hue"], "long": len(text), "answer": text if text in COLOURS else None}


def parsed(values):
    return sum(value is not None for value in values) / len(values)


def wrong_colour(doc):
    return COLOURS[(COLOURS.index(doc["hue"]) + 1) % 3]


def wrong_word(doc):
    return "w999"


def chat(doc):
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Colour {doc['id']}?"}]


def tools(doc):
    return [{"type": "function", "function": {"name": "paint", "description": "", "parameters": {}}}]
"""

WORDS = """
task: words
custom_dataset: !function functions.build_words
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: word
gen_prefix: "The word is"
process_results: !function functions.words_score
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: right, aggregation: mean, higher_is_better: true}
  - {metric: answer, aggregation: !function functions.parsed, higher_is_better: true}
metadata:
  version: 2
  headline: right
  options: {lengths: [200]}
  id: id
  group: [length]
  generated: true
  needles: needles
  unscored: [prompt]
  wrong: !function functions.wrong_word
"""

COLOURS = """
task: colours
tag: paint
custom_dataset: !function functions.build_colours
test_split: test
output_type: generate_until
doc_to_text: "Which colour is {{id}}?"
doc_to_target: hue
process_results: !function functions.colours_score
generation_kwargs: {until: [], max_gen_toks: 16, do_sample: true, temperature: 0.7, top_p: 0.9}
metric_list:
  - {metric: right, aggregation: mean, higher_is_better: true}
metadata:
  version: 1
  headline: right
  options: {bright: true, shade: "dark", weight: 0.5}
  id: id
  group: [kind]
  stratify: hue
  cluster: kind
  thinking: true
  wrong: !function functions.wrong_colour
"""

CHAT = COLOURS.replace("task: colours\n", "task: colours_chat\n").replace(
    "metadata:", "metadata:\n  messages: !function functions.chat"
)
NATIVE = COLOURS.replace("task: colours\n", "task: colours_native\n").replace(
    "metadata:", "metadata:\n  tools: !function functions.tools"
)


def write_tasks(folder: Path) -> Path:
    """Writes the tasks into folder/tasks and gives that folder."""
    root = folder / "tasks"
    (root / "made_up").mkdir(parents=True)
    (root / "made_up" / "functions.py").write_text(FUNCTIONS)
    for name, text in (("words", WORDS), ("colours", COLOURS), ("colours_chat", CHAT), ("colours_native", NATIVE)):
        (root / "made_up" / f"{name}.yaml").write_text(text)
    (root / "made_up" / "README.md").write_text("# Made-up tasks\n")
    (root / "made_up" / "group.yaml").write_text("group: everything\ntask: [words, colours]\n")
    return root
