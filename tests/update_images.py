"""Write the pictures the README shows, taken from the notebook's outputs.

Run `python tests/update_images.py` after the notebook was executed. A cell tagged
`picture-NAME` draws images/NAME.png.
"""

import base64
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "Model_pruning_exploration.ipynb"


def pictures(notebook):
    """Return {path: PNG bytes} of what a notebook's tagged cells have drawn."""
    found = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        tags = [tag.partition("-") for tag in cell["metadata"].get("tags", ())]
        for name in [name for kind, _, name in tags if kind == "picture"]:
            for output in cell["outputs"]:
                if png := "".join(output.get("data", {}).get("image/png", "")):
                    found[ROOT / "images" / f"{name}.png"] = base64.b64decode(png)
    return found


if __name__ == "__main__":
    for path, png in pictures(NOTEBOOK).items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png)
        print(f"{path.relative_to(ROOT)}: {len(png):,} bytes")
