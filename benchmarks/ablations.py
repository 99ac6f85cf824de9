"""The ablations of `arbllm ablate` on SmolLM2-135M, kept in docs/ablations.

    python benchmarks/ablations.py                     everything that is missing: hours on two cores, resumable
    python benchmarks/ablations.py --studies method    some studies, which then are the page

Perplexity on the first 16 windows of WikiText-2 test, calibrated on 16 windows of 2048 tokens of `wiki.valid.raw`. Data
are looked for under $ARBLLM_DATA or ../shared/data. What each step gave is kept in docs/ablations/rows and not run
again.
"""

from __future__ import annotations

import argparse
import shutil
import sys

from arbllm.errors import ArbllmError
from arbllm.evaluation.ablate import PAGE, RESULTS, ablate
from arbllm.evaluation.methods import Calibration
from arbllm.evaluation.protocol import ROWS, Protocol
from commands import demonstration_model
from compare import CALIBRATIONS, say, take_kept_rows
from results import CONTEXT, DATA, ROOT

WINDOWS = 16
"""Of both texts: those that calibrate, of which a study takes half and twice as many, and those that are read."""
KEPT, OUT = ROOT / "docs" / "ablations", ROOT / "out" / "ablations"


def main() -> None:
    """Run what is missing, keep rows and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", help="with commas, as `arbllm ablate` knows them; by default all")
    options = parser.parse_args()
    text = CALIBRATIONS["wikitext2"]
    protocol = Protocol(
        str(demonstration_model()),
        Calibration(str(text), WINDOWS, CONTEXT),
        (str(DATA / "wiki.test.raw"),),
        CONTEXT,
        WINDOWS,
    )
    take_kept_rows(KEPT, OUT)
    try:
        ablate(protocol, OUT, studies=options.studies.split(",") if options.studies else (), on_step=say)
    except ArbllmError as error:
        sys.exit(str(error))
    finally:
        keep()
    print(f"wrote {(KEPT / PAGE).relative_to(ROOT)}")


def keep() -> None:
    """Copy what there is of rows, figures and page."""
    (KEPT / ROWS).mkdir(parents=True, exist_ok=True)
    for file in (*(OUT / ROWS).glob("*.json"), OUT / RESULTS, OUT / PAGE):
        if file.exists():
            shutil.copy(file, KEPT / file.relative_to(OUT))


if __name__ == "__main__":
    main()
