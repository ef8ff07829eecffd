"""Builds the compiled part of fusedoptim. Installing never fails for want of a compiler: what could not be built is
left out, said here and, with its cause, by ``python -m fusedoptim``."""

from __future__ import annotations

import json
import os
import shutil
import traceback
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

torch_version: str | None = None
missing: str | None = None
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

    torch_version = torch.__version__
    if shutil.which(get_cxx_compiler()) is None:
        missing = (
            f"no C++ compiler called {get_cxx_compiler()!r} was found: "
            "install one (Debian, Ubuntu: apt-get install g++) or set CXX, then install fusedoptim again"
        )
except ImportError as error:
    BuildExtension = build_ext

    def CppExtension(name: str, sources: list[str], **_: object) -> Extension:
        return Extension(name, sources)

    missing = f"torch could not be imported while building ({error}): use pip install --no-build-isolation"

HERE = Path(__file__).parent
SOURCES = sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc").rglob("*.cpp"))
FLAGS = [
    "-O3",
    "-g0",
    # Exact results: no contraction of a*b + c. The other two let the compiler vectorise, and change no value.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-ignored-attributes",
    "-Wno-psabi",
    "-Wno-uninitialized",  # false alarms in GCC 12's own AVX-512 header
    "-Wno-maybe-uninitialized",
    "-Wno-unused-parameter",  # in torch's stable headers
    # The oldest torch that the library is to run on.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
# For the tests: memory errors and undefined behaviour in the kernels end the process.
LINK_FLAGS: list[str] = []
if os.environ.get("FUSEDOPTIM_SANITIZE") == "1":
    FLAGS = [f for f in FLAGS if f != "-g0"] + ["-O1", "-g1", "-fno-omit-frame-pointer"]
    LINK_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    FLAGS += LINK_FLAGS


class BuildWhatCanBeBuilt(BuildExtension):
    """torch's own build command, which here reports instead of failing."""

    def run(self) -> None:
        report = {"torch": torch_version, "cpu": None}
        try:
            if missing is not None:
                raise RuntimeError(missing)
            super().run()
        except Exception as error:
            traceback.print_exc()
            report["cpu"] = f"{type(error).__name__}: {error}".strip()[:2000]
            self.extensions = []
            self.announce(f"\nfusedoptim: installing without its compiled kernels: {report['cpu']}\n", level=3)
        target = HERE if self.inplace or self.editable_mode else Path(self.build_lib)
        (target / "fusedoptim").mkdir(parents=True, exist_ok=True)
        (target / "fusedoptim" / "_build.json").write_text(json.dumps(report, indent=1) + "\n")


setup(
    ext_modules=[CppExtension("fusedoptim._C", SOURCES, extra_compile_args={"cxx": FLAGS}, extra_link_args=LINK_FLAGS)],
    cmdclass={"build_ext": BuildWhatCanBeBuilt},
)
