"""Run a script of benchmarks/ on two gloo ranks."""

import subprocess
import sys
from pathlib import Path

from ranks import free_port

ROOT = Path(__file__).parent.parent


def torchrun(script: str, *options: str) -> str:
    """Return what it prints."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
    command = [sys.executable, *launcher, str(ROOT / "benchmarks" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
