"""All methods on SmolLM2-135M at their true size: `arbllm compare`, its report kept in docs/comparison.

    python benchmarks/compare.py                         everything that is missing: a day on two cores, resumable
    python benchmarks/compare.py --methods fp16,gptq-3   some methods; others that are there already stay in the report

Perplexity on the whole of WikiText-2 test, accuracy on 200 items of each of seven tasks, calibrated on 32 windows of
2048 tokens of `wiki.valid.raw`. Data are looked for under $ARBLLM_DATA or ../shared/data; what each step gave, and the
checkpoints, in out/comparison.
"""

from __future__ import annotations

import argparse
import shutil
import sys

from commands import arbllm, demonstration_model
from results import CONTEXT, DATA, JOINT_WINDOWS, ROOT

OUT, KEPT = ROOT / "out" / "comparison", ROOT / "docs" / "comparison"
METHODS = (
    "fp16,rtn-4,rtn-3,gptq-4,gptq-3,gptq-2,hqq-4,hqq-3,hqq-2,hqq-1,billm,arb,arb-x,arb-rc,"
    "arb-rcx-1.1,arb-rcx-1.6,arb-rcx-2.25-untuned,arb-rcx-2.25,arb-rcx-2.85"
)
TASKS = "arc_easy,arc_challenge,boolq,hellaswag,openbookqa,piqa,winogrande"


def main() -> None:
    """Run the comparison, then copy the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS, help="with commas")
    methods = parser.parse_args().methods
    for name in ("wiki.valid.raw", "wiki.test.raw"):
        if not (DATA / name).exists():
            sys.exit(f"{DATA / name} is missing: set ARBLLM_DATA to the directory that holds wikitext2/{name}")
    calibration = ("--calibration", DATA / "wiki.valid.raw", "--windows", str(JOINT_WINDOWS))
    text = ("--window-length", str(CONTEXT), "--text", DATA / "wiki.test.raw", "--context", str(CONTEXT))
    tasks = ("--tasks", TASKS, "--task-data", DATA.parent / "qa", "--limit", "200")
    arbllm("compare", demonstration_model(), "--methods", methods, "--out", OUT, *calibration, *text, *tasks)
    KEPT.mkdir(parents=True, exist_ok=True)
    for file in (OUT / "results.json", OUT / "report.html", *OUT.glob("*.png")):
        shutil.copy(file, KEPT)
    print(f"wrote {KEPT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
