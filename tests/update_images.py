"""Write the pictures the README shows, taken from the notebook's outputs.

Run `python tests/update_images.py` after the notebook was executed.
"""

import base64
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "Model_pruning_exploration.ipynb"
SWEEP_CELL = re.compile(r"^plot_sweep\(sweeps\[(\w+)\.title\]", re.MULTILINE)
NAMES = {"mnist": "mnist", "fashion": "fashion_mnist"}


def pictures(notebook):
    """Return {path: PNG bytes} of the sweeps drawn by a notebook's cells."""
    found = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        drawn = SWEEP_CELL.search("".join(cell["source"]))
        for output in cell.get("outputs", []) if drawn else []:
            png = "".join(output.get("data", {}).get("image/png", ""))
            if png:
                path = ROOT / "images" / f"{NAMES[drawn[1]]}_sweep.png"
                found[path] = base64.b64decode(png)
    return found


if __name__ == "__main__":
    for path, png in pictures(NOTEBOOK).items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png)
        print(f"{path.relative_to(ROOT)}: {len(png):,} bytes")
