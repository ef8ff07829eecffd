"""``python -m release.check_wheel WHEEL``: whether a wheel does what it should where nothing else is.

In a fresh virtual environment, in an empty folder, with no compiler, no nvcc and no sources on the path: it installs
beside the torch of ``--torch``, ``python -m fusedoptim`` finds nothing wrong, and a model trains with every optimizer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

#: What pip is told of the network.
NETWORK = ("http_proxy", "https_proxy", "no_proxy", "ssl_cert_file", "requests_ca_bundle")
#: A model that learns to add, with each optimizer. Those of the gallery on the CPU are stepped by their functions here,
#: with one warning that says that they want a compiler.
TRAINING = """
import warnings
import torch
import fusedoptim
from fusedoptim import gallery

torch.manual_seed(0)
x = torch.randn(256, 8)
y = x.sum(1, keepdim=True)

def train(make, backend):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = make(model.parameters(), backend)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in model.parameters()]

for name in ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NormAdaptive"):
    def make(params, backend, cls=getattr(fusedoptim, name)):
        return cls(params, lr=1e-2, backend=backend)
    losses, got = train(make, "cpu")
    _, expected = train(make, "reference")
    assert all(map(torch.equal, got, expected)), name
    assert losses[-1] < 0.7 * losses[0], (name, losses[0], losses[-1])
    print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, the reference's bits")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    losses, _ = train(lambda params, backend: gallery.Lion(params, lr=1e-2, backend=backend), None)
assert losses[-1] < 0.7 * losses[0]
print(f"Lion: loss {losses[0]:.3f} to {losses[-1]:.3f}")
for warning in said:
    print(f"  it warns: {warning.message}")
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m release.check_wheel", description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", default=sys.executable, help="an interpreter of the wheel's Python")
    parser.add_argument("--torch", default="torch", help="what pip is to install, such as torch==2.10.0")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inside = folder / "venv" / "bin"
        environment = {"PATH": str(inside), "HOME": temporary, "PYTHONWARNINGS": "ignore"}
        environment |= {
            name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.lower() in NETWORK
        }

        def run(*command: str | Path) -> None:
            print("+", *command, flush=True)
            subprocess.run([*map(str, command)], cwd=folder, env=environment, check=True)

        subprocess.run([args.python, "-m", "venv", str(folder / "venv")], check=True)
        python = inside / "python"
        run(python, "-m", "pip", "install", "-q", args.torch, args.wheel.resolve())
        run(python, "-m", "fusedoptim")
        (folder / "training.py").write_text(TRAINING)
        run(python, "training.py")
    print(f"{args.wheel.name} works with {args.torch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
