"""What the compiled libraries are made from, as a short text. Needs nothing of the package: setup.py, which writes the
text into the library, runs this file by itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".h", ".cuh", ".cpp", ".cu")


def sources(root: Path) -> str:
    """A digest of csrc and setup.py in a folder with both. Takes one to two milliseconds."""
    digest = hashlib.sha256()
    for path in [root / "setup.py", *sorted(p for p in (root / "csrc").rglob("*") if p.suffix in SUFFIXES)]:
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
