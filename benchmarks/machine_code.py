"""``python -m benchmarks.machine_code [LIBRARY]``: what the loops of the CUDA kernels execute, read off their machine
code. No GPU is needed, only cuobjdump, which the CUDA toolkit and Triton bring.

A loop's path is, of the ways through it that store most, the one with the fewest instructions: no slow path, and both
of the groups that a thread has under way. Predicated instructions count, taken or not.
"""

from __future__ import annotations

import heapq
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .common import arguments
from .gpu.toolkit import cuobjdump
from .tables import header, line

#: Threads of a block, and registers of a multiprocessor, which are given to warps in units of so many.
THREADS, REGISTERS, UNIT = 128, 65536, 256
#: Stores and loads of operands, which alone are streamed, and how wide.
STREAMED = r"(LDG|STG)\.E\.EF(\.128|\.64)?\b"


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    predicated: bool

    @property
    def conditional(self) -> bool:
        return self.predicated or re.match(r"BRA\S* (!?U?P\d|.*,)", self.text) is not None

    @property
    def target(self) -> int | None:
        """Where a jump goes."""
        match = re.match(r"BRA\S* .*?(0x[0-9a-f]+)", self.text)
        return None if match is None else int(match[1], 16)


@dataclass
class Loop:
    """What one pass executes."""

    path: list[Instruction]

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, i.text) is not None for i in self.path)

    @property
    def spills(self) -> int:
        return self.count("LDL|STL")

    @property
    def groups(self) -> int:
        """Groups of elements that a thread steps in a pass: one for each block's worth that its index goes on by."""
        jumps = (re.match(r"(?:IADD3|VIADD) (R\d+), \1(?:\.reuse)?, (0x[0-9a-f]+)\b", i.text) for i in self.path)
        return next((n // THREADS for m in jumps if m and (n := int(m[2], 16)) in (THREADS, 2 * THREADS)), 1)

    @property
    def dtypes(self) -> str:
        widths = {match[2] for i in self.path if (match := re.match(STREAMED, i.text))}
        halves = self.count(r"F2FP\.BF16") > 0
        return {(".128",): "bf16" if halves else "fp32", (".128", ".64"): "bf16 and fp32"}.get(
            tuple(sorted(map(str, widths))), "other"
        )

    @property
    def each(self) -> float:
        """Instructions per element."""
        return len(self.path) / (self.groups * (8 if self.dtypes == "bf16" else 4))

    @property
    def branches(self) -> float:
        """Per group of elements, the places where branches meet again included."""
        return self.count(r"(BRA|BSYNC|CALL|BREAK|WARPSYNC)") / self.groups


@dataclass
class Kernel:
    registers: int
    local_bytes: int
    code: list[Instruction] = field(default_factory=list)

    def addresses(self, pattern: str) -> list[int]:
        return [i.address for i in self.code if re.match(pattern, i.text)]

    @property
    def blocks(self) -> int:
        """That fit a multiprocessor by their registers."""
        warp = -(-self.registers * 32 // UNIT) * UNIT
        return REGISTERS // (warp * THREADS // 32)

    def loops(self, every_way: bool = False) -> Iterator[Loop]:
        """Those that stream operands, in the order of their addresses. ``every_way``: each once for every number of
        stores that a pass can make, not only for the most."""
        at = {i.address: n for n, i in enumerate(self.code)}
        after = [self._next(n, at) for n in range(len(self.code))]
        before: list[list[int]] = [[] for _ in after]
        for n, following in enumerate(after):
            for m in following:
                before[m].append(n)
        executed = _reached(0, after)
        for last in sorted(executed):
            for head in after[last]:
                # A jump back closes a loop if every way to it passes the head.
                if head <= last and (head == 0 or last not in _reached(0, after, without=head)):
                    paths = self._paths(head, last, after, {head} | _reached(last, before, without=head))
                    for stores in sorted(paths) if every_way else sorted(paths)[-1:]:
                        yield Loop([self.code[n] for n in paths[stores]])

    def _next(self, n: int, at: dict[int, int]) -> list[int]:
        i = self.code[n]
        falls = [n + 1] if n + 1 < len(self.code) else []
        if i.target is not None:
            return [at[i.target], *falls] if i.conditional else [at[i.target]]
        return falls if i.conditional or not i.text.startswith(("EXIT", "RET")) else []

    def _paths(self, first: int, last: int, after: list[list[int]], inside: set[int]) -> dict[int, list[int]]:
        """From the first instruction to the jump back, by the number of stores on the way, by Dijkstra's algorithm."""
        streams = {n for n in inside if re.match(STREAMED, self.code[n].text)}
        if {self.code[n].text[:3] for n in streams} != {"LDG", "STG"}:
            return {}
        came: dict[tuple[int, int], tuple[int, int]] = {}
        queue = [(0, first, 0, (first, 0))]
        found: dict[int, list[int]] = {}
        while queue:
            steps, n, stores, before = heapq.heappop(queue)
            if (n, stores) in came:
                continue
            came[n, stores] = before
            if n == last:
                found[stores] = self._back(came, (n, stores))
                continue
            more = stores + (n in streams and self.code[n].text.startswith("STG"))
            for m in after[n]:
                if m != first and m in inside:
                    heapq.heappush(queue, (steps + 1, m, more, (n, stores)))
        return found

    @staticmethod
    def _back(came: dict[tuple[int, int], tuple[int, int]], here: tuple[int, int]) -> list[int]:
        path = [here[0]]
        while came[here] != here:
            here = came[here]
            path.append(here[0])
        return path[::-1]


def _reached(start: int, following: list[list[int]], without: int | None = None) -> set[int]:
    """What comes after the start on ways that do not pass ``without``, the start included."""
    found, left = {start}, [start]
    while left:
        for n in following[left.pop()]:
            if n not in found and n != without:
                found.add(n)
                left.append(n)
    return found


def _run(library: Path, *options: str) -> str:
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump was not found: install the CUDA toolkit or Triton")
    return subprocess.run([tool, *options, str(library)], capture_output=True, text=True, check=True).stdout


def architectures(library: Path) -> list[str]:
    """Those it has machine code for, such as sm_90, the newest last."""
    return [f"sm_{n}" for n in sorted(map(int, set(re.findall(r"sm_(\d+)", _run(library, "-lelf")))))]


def read(library: Path, architecture: str | None = None) -> dict[str, Kernel]:
    """Kernels by mangled name, for an architecture such as sm_90, or the newest that the library has code for.

    Raises:
        FileNotFoundError: if there is no cuobjdump.
    """
    listing = _run(library, "-arch", architecture or architectures(library)[-1], "-sass", "-res-usage")
    usage = {
        name: (int(registers), int(local))
        for name, registers, local in re.findall(r"Function (\S+):\n\s*REG:(\d+) .*?LOCAL:(\d+)", listing)
    }
    found: dict[str, Kernel] = {}
    current: Kernel | None = None
    for text in listing.splitlines():
        if match := re.search(r"Function : (\S+)", text):
            current = found[match[1]] = Kernel(*usage[match[1]])
        elif current is not None and (match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\d+ )?(.*?);", text)):
            current.code.append(Instruction(int(match[1], 16), match[3].strip(), match[2] is not None))
    return found


def rule_and_width(name: str, stored: bool = False) -> tuple[str, bool] | None:
    """Of a kernel that steps: its rule's name in C++, and whether it is for tensors with operands of 64 bits.
    ``stored``: of those for storages that may be no dtypes."""
    match = re.search(rf"step_kernelINS_\d+(\w+?)ELb([01])ELb{int(stored)}E", name)
    return None if match is None else (match[1], match[2] == "1")


def looks_storages_up(loop: Loop) -> bool:
    """Whether it is the loop for all storages, which branches for every operand's."""
    return loop.branches > 20


def known_mix(loop: Loop, states: int) -> tuple[str, int] | None:
    """Of a loop for storages that may be no dtypes, of a rule with so many states, one of them a second moment: which
    mix it is for, and how many elements a pass has. By what it loads and stores, 16, 8 and 4 bytes at once, and how
    often it rounds two numbers to bf16. None for the loop that looks storages up."""
    if looks_storages_up(loop):
        return None
    accesses = tuple(loop.count(rf"{op}\.E\.EF\.{bits}\b") for op in ("LDG", "STG") for bits in (128, 64))
    pairs, n = loop.count(r"F2FP\.BF16"), states
    if words := loop.count(r"(LDG|STG)\.E\.EF "):
        return ("fp32, 8 bits", 4) if (accesses, words) == ((2, 0, 1, 0), 2 * n) else None
    if accesses == (2 + n, 0, 1 + n, 0) and pairs == loop.count("PRMT") == 0:
        return "fp32", 4
    return {
        ((2 + n, 0, 1 + n, 0), 4 * (n + 1)): ("bf16", 8),
        ((2 + n, 0, 1 + n, 0), 0): ("bf16 stochastic, all states as well", 8),
        ((2 + n, 0, 1 + n, 0), 4 * n): ("bf16, v stochastic", 8),
        ((2 + n, 0, 1 + n, 0), 4 * (n - 1)): ("bf16 stochastic, v as well", 8),
        ((3 + n, 0, 2 + n, 0), 4 * (n - 1)): ("remainder, v stochastic", 8),
        ((n, 3, n, 2), 0): ("remainder, fp32 states", 4),
        ((1 + n, 2, 1 + n, 1), 2): ("fp32 master and states", 4),
        ((2, n, 1, n), 2 * (n - 1)): ("fp32, states in bf16", 4),
        ((3, n, 2, n), 0): ("remainder, 8 bits", 8),
        ((2, n + 1, 1, n + 1), 0): ("8-bit remainder, 8 bits", 8),
    }.get((accesses, pairs))


def stored_table(kernels: dict[str, Kernel]) -> list[str]:
    """Of AdamW's loops for mixes of storages."""
    lines = header(["storages", "instructions per element", "branches", "spills", "registers", "blocks"], 1)
    for name, kernel in kernels.items():
        if rule_and_width(name, stored=True) != ("Adam", False):
            continue
        for loop in kernel.loops(every_way=True):
            if mix := known_mix(loop, states=2):
                numbers = f"{len(loop.path) / mix[1]:.1f}", f"{loop.branches:.0f}", loop.spills
                lines.append(line([mix[0], *map(str, (*numbers, kernel.registers, kernel.blocks))]))
    return lines


def table(kernels: dict[str, Kernel]) -> list[str]:
    names = ["kernel", "loop", "dtypes", "instructions per element", "branches per group", "spills", "registers"]
    lines = header([*names, "blocks"], 3)
    for name, kernel in sorted(kernels.items()):
        rule = rule_and_width(name)
        if rule is None or rule[1]:
            continue
        for number, loop in enumerate(kernel.loops(), 1):
            where = [rule[0], f"{number}, {loop.count('STG[.]E[.]EF')} stores", loop.dtypes]
            numbers = f"{loop.each:.1f}", f"{loop.branches:.1f}", loop.spills, kernel.registers, kernel.blocks
            lines.append(line([*where, *map(str, numbers)]))
    return lines


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.machine_code", description=__doc__)
    default = Path(__file__).parent.parent / "fusedoptim" / "_C_cuda.so"
    p.add_argument("library", nargs="?", type=Path, default=default, help="default: the CUDA kernels built here")
    p.add_argument("--arch", help="such as sm_90 (default: the newest in the library)")
    args = p.parse_args(argv)
    kernels = read(args.library, args.arch)
    print("\n".join([*table(kernels), "", *stored_table(kernels)]))
    return 0


if __name__ == "__main__":
    arguments.run(main)
