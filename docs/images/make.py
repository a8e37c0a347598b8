"""Makes the pictures of docs/howto/diff.md, of SmolLM2 as `octavo import` writes it and as it is compiled. `make docs` runs this.

Chromium draws the page and, of the comment's markdown, a table.
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import octavo
from octavo.__main__ import packaged_gguf

HERE = Path(__file__).parent
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
STEP = "quantize_linears"    # the pass whose picture is taken
RULES = ["expect ai.octavo::PagedAttention == layers", "forbid Softmax", "max_growth weight_bytes 0", "max_new Gather 0"]
STYLE = """body { font: 14px/1.5 system-ui, "DejaVu Sans", sans-serif; max-width: 900px; margin: 24px auto; color: #1f2328 }
table { border-collapse: collapse; width: 100%; font-size: 13px }
td:first-child, td:nth-child(3) { white-space: nowrap }
td { border: 1px solid #d0d7de; padding: 5px 10px; text-align: left; overflow-wrap: anywhere }
code { background: #eff1f3; padding: 2px 4px; border-radius: 4px }"""


def draw(page: Path, picture: Path, size: str, fragment: str = "") -> None:
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars",
             f"--user-data-dir={profile}", f"--window-size={size}", "--virtual-time-budget=20000", f"--screenshot={picture}", page.as_uri() + fragment],
            check=True, capture_output=True,
        )


def table(markdown: str) -> str:
    """The few things of markdown that the comment uses."""
    out = []
    for line in markdown.splitlines():
        if line.startswith("|---"):
            continue
        if line.startswith("|"):
            cells = [re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(cell.strip(), quote=False)) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            out.append("<table><tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr></table>")
        elif line.startswith("### "):
            out.append(f"<h3>{html.escape(line[4:])}</h3>")
        elif line.startswith("- "):
            out.append(f"<li>{html.escape(line[2:])}</li>")
        else:
            out.append(line.replace("<details>", "<details open>") if line.startswith("<") else f"<p>{html.escape(line)}</p>" if line else "")
    text = "\n".join(out).replace("</table>\n<table>", "\n")
    return f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{text.replace('&amp;lt;', '&lt;')}"


def main() -> None:
    if BROWSER is None:
        sys.exit("Chromium is needed to draw the pages (Debian: apt install chromium)")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = octavo.import_model(packaged_gguf(), folder / "smollm2")
        octavo.compile(source, folder / "compiled", options=octavo.CompileOptions(weights="stored", kv_cache="int8"), html=folder / "page.html")
        draw(folder / "page.html", HERE / "diff-page.png", "1600,1000")
        draw(folder / "page.html", HERE / "compile-pass.png", "1600,1000", f"#step={STEP}")
        (folder / "rules.toml").write_text(f"rules = {RULES!r}")
        diff = octavo.diff(source, folder / "compiled", policy=folder / "rules.toml")
        text = diff.to_markdown().replace(f"{source.parent}/", "").replace(f"{folder}/", "")
        # No font with these signs is needed then.
        for sign, plain in (("✅", "✓"), ("❌", "✗"), ("🔵", "●"), ("🔴", "●")):
            text = text.replace(sign, plain)
        (folder / "comment.html").write_text(table(text))
        draw(folder / "comment.html", HERE / "diff-comment.png", "960,1310")


if __name__ == "__main__":
    main()
