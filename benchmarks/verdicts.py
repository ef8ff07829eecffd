"""What counts as passed, for the parts of the GPU check. Without torch."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from .parts import ABSENT, FAILED, PASSED, ROOT, Outcome, Verdict, exit_code
from .results import OURS, load


def build(outcome: Outcome, cuda: bool) -> Verdict:
    """Installing never fails for want of a compiler; its report says what was left out."""
    plain = exit_code(outcome)
    if plain.state != PASSED:
        return plain
    report = json.loads((ROOT / "fusedoptim" / "_build.json").read_text())
    for name in ("cpu", "cuda") if cuda else ("cpu",):
        if report[name] is not None:
            return Verdict(FAILED, f"without its {name} kernels: {report[name]}"[:300])
    return Verdict(PASSED, f"torch {report['torch']}")


def self_check(outcome: Outcome, backend: str) -> Verdict:
    lines = outcome.output.splitlines()
    problem = next((text.strip() for text in lines if re.match(rf"\s+{backend}\s+not available", text)), None)
    shown = [text for text in lines if text.startswith("self-check:")]
    plain = exit_code(outcome)
    if problem is not None or plain.state != PASSED:
        return Verdict(FAILED, "; ".join(filter(None, (problem, plain.note, *shown)))[:300])
    if not any(f" {backend}, " in text for text in shown):
        return Verdict(FAILED, f"{backend} was not checked")
    return Verdict(PASSED, "; ".join(text.removeprefix("self-check: ") for text in shown))


def tests(outcome: Outcome, report: Path) -> Verdict:
    """A test that is skipped has not been run, and that is a failure on the machine that it is for."""
    if not report.exists():
        return Verdict(FAILED, f"no counts; {exit_code(outcome).note or outcome.last_line}")
    passed, bad = 0, []
    skipped: dict[str, int] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = str(case.get("name"))
        if case.find("failure") is not None or case.find("error") is not None:
            bad.append(name)
        elif (why := case.find("skipped")) is not None:
            reason = str(why.get("message"))
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            passed += 1
    note = f"{passed} passed, {len(bad)} failed, {sum(skipped.values())} skipped"
    note += f" ({', '.join(f'{n} {reason}' for reason, n in skipped.items())})" if skipped else ""
    note += f"; failed: {', '.join(bad[:5])}" if bad else ""
    plain = exit_code(outcome)
    if plain.state != PASSED and not bad:
        note += f"; {plain.note}"
    right = plain.state == PASSED and passed > 0 and not bad and not skipped
    return Verdict(PASSED if right else FAILED, note[:500])


def benchmarks(outcome: Outcome, path: Path, whole: bool) -> Verdict:
    """Unless the whole is wanted, what was measured until the time was over is enough."""
    if not path.exists():
        return Verdict(FAILED, exit_code(outcome).note or outcome.last_line)
    results = load(path)
    rows = [*results.rows, *results.scaling]
    mine = [r.get("failed") or r.get("contenders", {}).get(OURS, {}).get("failed") for r in rows]
    failed = [f"{r['optimizer']} {r['dtype']} {r['case']}: {why}" for r, why in zip(rows, mine, strict=True) if why]
    skipped = sum("skipped" in r for r in rows)
    measured = len(rows) - len(failed) - skipped
    note = f"{measured} of {results.planned} rows measured, {len(failed)} failed"
    note += f", {skipped} skipped" if skipped else ""
    note += f"; {failed[0]}" if failed else ""
    if outcome.cut is not None:
        note += f"; {outcome.cut}"
    elif not results.finished:
        note += f"; {exit_code(outcome).note}"
    right = measured > 0 and not failed and (results.finished if whole or outcome.cut is None else True)
    return Verdict(PASSED if right else FAILED, note[:500])


def sanitizer(outcome: Outcome, found: int) -> Verdict:
    shown = [text.strip("= ") for text in outcome.output.splitlines() if " SUMMARY: " in text]
    summary = shown[-1] if shown else "it gave no summary"
    if outcome.cut is None and outcome.code == found:
        return Verdict(FAILED, f"found errors: {summary}")
    plain = exit_code(outcome)
    right = plain.state == PASSED and shown and " 0 wrong" in outcome.output
    return Verdict(PASSED if right else FAILED, "; ".join(filter(None, (plain.note, summary))))


def ncu(outcome: Outcome) -> Verdict:
    """Counters are often for administrators alone."""
    if "ERR_NVGPUCTRPERM" in outcome.output:
        return Verdict(ABSENT, "no permission to read the GPU's counters (ERR_NVGPUCTRPERM)")
    plain = exit_code(outcome)
    lines = outcome.output.splitlines()
    start = next((i for i, text in enumerate(lines) if text.startswith('"ID"')), None)
    if start is None:
        return Verdict(FAILED, plain.note or f"it measured nothing: {outcome.last_line}")
    rows = [r for r in csv.DictReader(text for text in lines[start:] if text.startswith('"'))]
    shares = [r["Metric Value"] for r in rows if r.get("Metric Name", "").startswith("dram__throughput")]
    note = f"{len({r['ID'] for r in rows})} launches; % of peak memory bandwidth: {', '.join(shares)}"
    return Verdict(plain.state, "; ".join(filter(None, (plain.note, note)))[:300])
