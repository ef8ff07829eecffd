"""``python -m benchmarks.launch_cost``: what a launch costs with kernel arguments of 256 bytes to 32 KB, on a GPU."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from .common import arguments
from .common.arguments import UsageError
from .gpu.toolkit import tool


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.launch_cost", description=__doc__)
    p.add_argument("--arch", default="native", help="for nvcc (default: of the GPU that is there)")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "launch_cost"
        source = Path(__file__).with_suffix(".cu")
        try:
            subprocess.run([tool("nvcc"), "-O2", f"-arch={args.arch}", str(source), "-o", str(program)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UsageError(f"nvcc cannot compile {source.name}: {error}") from error
        return subprocess.run([str(program)]).returncode


if __name__ == "__main__":
    arguments.run(main)
