"""Times this project beside PyTorch, in one run: the same sizes, inputs and random weights.

    make bench                            # on whatever is there: HuBERT-base and an LLM of 0.5B on a CPU
    python -m benchmarks --size tiny      # a smoke test
    python -m benchmarks --works encoder stage2 --size accelerator-8b

The works: the encoder's forward pass, a step of stage 1 and of stage 2, greedy decoding. Each framework has a
process of its own, one after the other. Times are medians after warming up; memory is what the compiled
program needs here, and the peak that PyTorch allocated there. Prints a table, and keeps a JSON file.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.sizes import SIZES

WORKS = ("encoder", "stage1", "stage2", "decoding")
# Dense bfloat16 FLOP/s of one chip, by what its name contains: NVIDIA's data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12}


def run(module: str, *arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a process says of itself, and its results. Raises CalledProcessError when it fails."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    print(f"{' '.join(command[1:])} ...", file=sys.stderr, flush=True)
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    about, *rows = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
    return about, rows


def table(results: dict[str, Any]) -> str:
    """The results side by side; above 1 in the last columns is ahead of PyTorch."""
    others = [name for name in results["rows"] if name != "ours"]
    lines = [f"{results['device']}, {results['size']}: {results['versions']['ours']}"]
    lines += [f"beside {results['versions'][name]}" for name in others]
    lines.append(f"{'work':<38}{'ms':>10}{'TFLOP/s':>9}{'of peak':>9}{'GiB':>7}{'compile s':>10}")
    for row in results["rows"]["ours"]:
        rate, memory = row.get("tflops_per_second"), row.get("bytes")
        share = None if rate is None or not results["peak"] else rate * 1e12 / results["peak"]
        line = f"{row['work'] + ' ' + row['case']:<38}{1e3 * row['seconds']:>10.2f}"
        line += f"{'' if rate is None else f'{rate:.2f}':>9}{'' if share is None else f'{share:.0%}':>9}"
        line += f"{'' if memory is None else f'{memory / 2**30:.1f}':>7}{row['compile_seconds']:>10.1f}"
        for name in others:
            for other in results["rows"][name]:
                if (other["work"], other["case"]) == (row["work"], row["case"]):
                    line += f"   {name} {1e3 * other['seconds']:.2f} ms"
                    line += f", {other['bytes'] / 2**30:.1f} GiB" if "bytes" in other else ""
                    line += f": {other['seconds'] / row['seconds']:.2f} x"
        lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    description, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, help="as the device is")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=WORKS, metavar="WORK")
    parser.add_argument("--compiled", action="store_true", help="PyTorch with torch.compile as well")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/results.json"))
    args = parser.parse_args(argv)
    about, rows = run("ours", args.size or "", *args.works)
    size = about["size"]
    results: dict[str, Any] = {"size": size, "device": about["device"]}
    results["peak"] = next((peak for name, peak in PEAKS.items() if name in about["device"]), None)
    results |= {"versions": {"ours": about["versions"]}, "rows": {"ours": rows}}
    hows = ["eager", "compiled"] if args.compiled else ["eager"]
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not there: nothing to compare with.", file=sys.stderr)
        hows = []
    for how in hows:
        about, rows = run("baseline", how, size, *args.works)
        results["versions"][f"torch {how}"], results["rows"][f"torch {how}"] = about["versions"], rows
    print(table(results))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
