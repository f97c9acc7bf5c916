"""Two processes train the model that one trains."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.errors import ModelError
from model.training.world import World

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from model.training.build import new_model
from model.training.checkpoint import Folder
from model.training.loop import Training
from model.training.world import join_world
from tests.model.training.toy import RAW, ToyCorpus, toy_config, toy_stage
stages = (toy_stage("dense", 4), toy_stage("warmup", 2), toy_stage("sparse", 4, seconds=1000.0))
world = join_world()
training = Training(new_model(RAW, 0), Folder(raw=RAW, tokenizer=None), toy_config(*stages), ToyCorpus(), (),
                    Path(sys.argv[1]), world)
for event in training.run():
    pass
"""


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    for name, launcher in (("one", []), ("two", [*torchrun, "--rdzv-endpoint=localhost:0"])):
        done = subprocess.run(
            [sys.executable, *launcher, str(script), str(tmp_path / name)],
            cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


def test_rows_that_cannot_be_dealt_evenly_are_an_error():
    share = World(rank=1, size=4, device=torch.device("cpu")).share
    assert share.of(8) == range(2, 4)
    with pytest.raises(ModelError, match="6 rows a step cannot be dealt to 4 processes"):
        share.of(6)
