"""Commands print only their own output: no warnings, import notices or deprecations of libraries."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_models import write_llama, write_sums

COMMANDS = """
import sys
from alp.cli import run

for line in sys.stdin.read().splitlines():
    sys.argv = ["alp", *line.split()]
    assert run() == 0, line
"""


@pytest.mark.parametrize("adapters", [True, False])
def test_every_command_prints_its_own_lines_alone(tmp_path: Path, adapters: bool) -> None:
    """Run in a separate process with Python's default warnings; every line on stderr is progress."""
    sums = write_sums(tmp_path / "sums.jsonl")
    if adapters:
        model = (
            f"--model.path {write_llama(tmp_path / 'llama')} --model.lora 2 --task.path {sums} --rollout.path ao-int8"
        )
    else:
        model = "--warmup.accuracy 0 --task.name chain_sum --model.num-layers 2"
    small = "--steps 1 --rollout.prompts 2 --rollout.samples 2 --update.minibatches 1 --eval-prompts 2"
    run = tmp_path / "runs" / "r"
    lines = [
        f"train {model} {small} --rollout.max-new-tokens 3 --model.gradient-checkpointing --runs {run.parent} --name r",
        *([f"train --resume {run}", f"eval {run}", f"eval {run} --on {sums} --samples 2"] if adapters else []),
        *([] if adapters else [f"report {run}", "doctor"]),
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    strange = [line for line in done.stderr.splitlines() if not line.startswith(("train ", "warm-up ", "alp: "))]
    assert strange == []
    assert not [line for line in done.stdout.splitlines() if "arning" in line or "deprecat" in line]
