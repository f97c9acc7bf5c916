"""Opening models by what the config says: facts before weights, the right encoding, the right engine."""

import subprocess
import sys
from pathlib import Path

from harness.config import EndpointModel, ScriptedModel
from harness.endpoint import EndpointEngine
from harness.engine import Attention, describe_model, open_encoding, open_engine
from harness.scripted import ByteEncoding, ScriptedEngine

REPOSITORY = Path(__file__).resolve().parents[2]


def endpoint(**changes) -> EndpointModel:
    return EndpointModel(**{"endpoint": "http://localhost:1/v1", "name": "n", **changes})


def test_scripts_and_endpoints_have_no_weights_to_describe():
    gold, empty = (describe_model(ScriptedModel(scripted=script)) for script in ("gold", "empty"))
    assert gold.fingerprint != empty.fingerprint
    assert (gold.context_length, gold.selectors) == (None, ())
    assert describe_model(endpoint()).fingerprint != describe_model(endpoint(name="other")).fingerprint


def test_the_name_of_the_key_is_not_part_of_what_an_endpoint_is():
    assert describe_model(endpoint(key_env="A")) == describe_model(endpoint(key_env="B"))


def test_scripts_and_endpoints_without_a_tokenizer_count_bytes():
    assert isinstance(open_encoding(ScriptedModel(scripted="gold")), ByteEncoding)
    assert isinstance(open_encoding(endpoint()), ByteEncoding)


def test_engines_are_opened_by_kind():
    attentions = {"dense": Attention()}
    assert isinstance(open_engine(ScriptedModel(scripted="gold"), attentions), ScriptedEngine)
    assert isinstance(open_engine(endpoint(), attentions), EndpointEngine)


def test_importing_the_door_to_the_model_loads_no_torch():
    code = "import harness.engine, sys; print({'torch', 'transformers', 'openai'} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "set()"
