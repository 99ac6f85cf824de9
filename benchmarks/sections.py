"""Pages that several benchmarks write: each rewrites the section between its own two marks, and nothing else."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PERFORMANCE = ROOT / "docs" / "performance.md"


def write_section(page: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- name -->` and `<!-- end of name -->`, which go to the end where the page lacks them."""
    before, after = f"<!-- {name} -->", f"<!-- end of {name} -->"
    section = f"{before}\n\n{text.strip()}\n\n{after}"
    written = page.read_text() if page.exists() else "# Performance\n"
    if before in written:
        head, _, rest = written.partition(before)
        _, _, tail = rest.partition(after)
        page.write_text(head + section + tail)
    else:
        page.write_text(f"{written.rstrip()}\n\n{section}\n")
