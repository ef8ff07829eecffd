"""``python -m benchmarks.launch_cost``: what a launch costs with kernel arguments of 256 bytes to 32 KB, on a GPU."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from .common import arguments
from .gpu.toolkit import tool


def main() -> int:
    arguments.Parser(prog="python -m benchmarks.launch_cost", description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "launch_cost"
        source = Path(__file__).with_suffix(".cu")
        try:
            subprocess.run([tool("nvcc"), "-O2", "-arch=native", str(source), "-o", str(program)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise arguments.UsageError(f"nvcc cannot compile {source.name}: {error}") from error
        return subprocess.run([str(program)]).returncode


if __name__ == "__main__":
    arguments.run(main)
