"""The committed notebook and the README keep to the house style."""

import ast
import builtins
import collections
import re
import subprocess
import symtable

import nbformat
import pytest
from conftest import sets_constants
from update_images import NOTEBOOK, ROOT, pictures

BOOK = nbformat.read(NOTEBOOK, as_version=4)
CODE = [cell for cell in BOOK.cells if cell.cell_type == "code"]
MARKDOWN = [cell for cell in BOOK.cells if cell.cell_type == "markdown"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
IMPORTS = ast.Import, ast.ImportFrom
REPOSITORY = re.compile(
    r"(?:/github|/gh|usercontent\.com|clone https://github\.com)"
    r"/([\w-]+/[\w.-]*\w)"
)


def report(faults):
    """Fail with one line per fault, if there is any."""
    __tracebackhide__ = True
    faults = list(faults)
    if faults:
        pytest.fail("\n".join(map(str, faults)), pytrace=False)


def place(cell):
    """Name a cell by its number and its first line."""
    first = next(iter(cell.source.strip().splitlines()), "(empty)")
    return f"cell {BOOK.cells.index(cell)} ({first[:50]!r})"


def tree_of(cell):
    """Return a code cell's syntax tree, an empty one if it has none."""
    try:
        return ast.parse(cell.source)
    except SyntaxError:  # reported by test_code_is_plain_python
        return ast.parse("")


def has_prose(cell):
    """Tell whether a Markdown cell says more than a heading."""
    lines = [line.strip() for line in cell.source.splitlines()]
    return any(line and not line.startswith("#") for line in lines)


def outputs_text(cell):
    """Return all text a code cell put out."""
    texts = []
    for output in cell.outputs:
        texts.append(output.get("text", ""))
        for kind, value in output.get("data", {}).items():
            if not kind.startswith("image/"):
                texts.append(value if isinstance(value, str) else str(value))
    return "\n".join(texts)


def bullets(markdown):
    """Return the bullet points of a Markdown text, unwrapped, without bold words."""
    points = re.findall(r"^[-*] (.+(?:\n {2,}\S.*)*)", markdown, re.MULTILINE)
    return [" ".join(re.sub(r"\*\*.*?\*\*", "", p).split()) for p in points]


def is_tool(cell):
    """Tell whether a code cell holds functions rather than the story."""
    return cell.source.startswith("# @title Tools: ")


def is_folded(cell):
    """Tell whether a code cell is folded, in Jupyter and in Colab."""
    in_jupyter = cell.metadata.get("jupyter", {}).get("source_hidden", False)
    assert in_jupyter == (cell.metadata.get("cellView") == "form"), place(cell)
    return in_jupyter


def lines_of(cells):
    """Return the number of lines of code, docstrings included, comments not."""
    lines = [line.strip() for cell in cells for line in cell.source.splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def before(text):
    """Return the code cells before the one that holds a text, and that one."""
    (index,) = (i for i, cell in enumerate(CODE) if text in cell.source)
    return CODE[: index + 1]


def calls_of(cell, *names):
    """Return the calls of functions in a code cell, outside definitions."""
    runs = [s for s in tree_of(cell).body if not isinstance(s, DEFINITIONS)]
    calls = [n for s in runs for n in ast.walk(s) if isinstance(n, ast.Call)]
    return [c for c in calls if getattr(c.func, "id", None) in names]


def claims_of(cell):
    """Return the literal claims that a code cell checks."""
    claims = [call.args[0] for call in calls_of(cell, "check")]
    return [c.value for c in claims if isinstance(c, ast.Constant)]


def headings(cell):
    """Return the title and the parts' headings in a Markdown cell."""
    text = re.sub("```.*?```", "", cell.source, flags=re.DOTALL)
    return [line for line in text.splitlines() if re.match("#{1,2} ", line)]


CLAIMS = [claim for cell in CODE for claim in claims_of(cell)]


# The file: executed in order, clean, small.


def test_cells_are_executed_in_order():
    counts = [cell.execution_count for cell in CODE]
    wanted = list(range(1, len(CODE) + 1))
    assert counts == wanted, "run all cells in a fresh kernel and save"


def test_outputs_hold_no_errors_and_no_stderr():
    report(
        f"{place(cell)}: {output.get('name', 'error')} in the output"
        for cell in CODE
        for output in cell.outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    )


def test_outputs_hold_no_addresses_times_or_paths():
    unstable = {
        "an object's address": r" at 0x[0-9a-f]{6,}",
        "a timestamp": r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d",
        "a machine path": r"(?<![\w./-])(/(home|root|tmp|work|Users|usr|opt|"
        r"var|mnt|content)/|[A-Z]:\\)",
    }
    report(
        f"{place(cell)}: {what}: {match[0]!r}"
        for cell in BOOK.cells
        for text in [cell.source, outputs_text(cell) if cell in CODE else ""]
        for what, pattern in unstable.items()
        for match in re.finditer(pattern, text)
    )


def test_notebook_is_valid():
    nbformat.validate(BOOK)


def test_notebook_is_under_2_megabytes():
    assert NOTEBOOK.stat().st_size < 2_000_000, "shrink or drop pictures"


def test_metadata_name_the_language():
    metadata = BOOK.metadata
    assert metadata.get("kernelspec", {}).get("language") == "python"
    assert metadata.get("language_info", {}).get("name") == "python", (
        "without language_info.name ruff skips the notebook: execute it"
    )


def test_metadata_hold_no_widgets():
    assert "widgets" not in BOOK.metadata, "they break GitHub's viewer"


def test_metadata_of_cells_are_tags_and_folds_only():
    """Execute with record_timing=False, so that no times are left behind."""
    known = {"tags": list, "cellView": str, "jupyter": dict}
    report(
        f"{place(cell)}: metadata {key}: {value}"
        for cell in BOOK.cells
        for key, value in cell.metadata.items()
        if not isinstance(value, known.get(key, ()))
        or (key == "jupyter" and value != {"source_hidden": True})
    )


def test_outputs_are_of_the_real_data():
    report(
        f"{place(cell)}: speaks of a stand-in; run it on the real data"
        for cell in CODE
        if "stand-in" in outputs_text(cell)
    )


# The story: results early, prose around them, functions in cells of their own.


def test_the_notebook_is_short():
    assert len(BOOK.cells) <= 200 and lines_of(CODE) <= 2620


def test_a_pruned_network_comes_at_once():
    cells = before("small.evaluate(mnist.x_test, mnist.y_test, verbose=0)\nprint(")
    visible = [cell for cell in cells if not is_folded(cell)]
    assert lines_of(visible) <= 40
    assert lines_of(cells) <= 120


def test_the_sweep_comes_soon():
    cells = before("sweeps[title] = ")
    assert lines_of(cell for cell in cells if not is_folded(cell)) <= 330


def test_the_walkthrough_is_short():
    cells = before("typical initial weight.")
    assert lines_of(cell for cell in cells if not is_folded(cell)) <= 450


def test_most_code_cells_show_something():
    showing = [cell for cell in CODE if outputs_text(cell).strip()]
    assert len(showing) >= 0.65 * len(CODE)


def test_story_cells_have_at_most_25_lines_and_tools_70():
    counts = [(cell, lines_of([cell]), 70 if is_tool(cell) else 25) for cell in CODE]
    report(
        f"{place(cell)}: {count} lines, {limit} is the limit"
        for cell, count, limit in counts
        if count > limit and CODE.index(cell)
    )


def test_functions_stand_in_tool_cells_which_show_nothing():
    report(
        f"{place(cell)}: {'tools show something' if is_tool(cell) else 'a function'}"
        for cell in CODE[1:]
        if (is_tool(cell) and cell.outputs)
        or (
            not is_tool(cell)
            and any(isinstance(s, DEFINITIONS) for s in tree_of(cell).body)
        )
    )


def test_tools_that_are_not_about_pruning_are_folded():
    topics = "log lines|the data|copying|training and|drawing|checked claims"
    topics += (
        "|what Keras calls|what layers do|the units|what is alive"  # Keras's own graphs
    )
    report(
        f"{place(cell)}: should {'' if wanted else 'not '}be folded"
        for cell in CODE[1:]
        for wanted in [is_tool(cell) and bool(re.match(f".*({topics})", cell.source))]
        if is_folded(cell) != wanted
    )
    assert is_folded(CODE[0])


def test_never_more_than_three_code_cells_in_a_row():
    kinds = "".join(cell.cell_type[0] for cell in BOOK.cells)
    report(
        f"{place(BOOK.cells[match.start()])}: starts a row of code cells"
        for match in re.finditer("c{4,}", kinds)
    )


def test_every_picture_is_followed_by_prose():
    """At once, or after a cell that checks what the picture shows."""
    report(
        f"{place(cell)}: no sentence after the picture says what it shows"
        for index, cell in enumerate(BOOK.cells)
        if any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))
        and not any(c in MARKDOWN and has_prose(c) for c in BOOK.cells[index + 1 :][:2])
    )


def test_parts_are_numbered():
    heads = [head for cell in MARKDOWN for head in headings(cell)]
    titles = [head for head in heads if head.startswith("# ")]
    parts = [re.match(r"## (\d+)\. ", h) for h in heads if h not in titles]
    assert len(titles) == 1 and heads[0] == titles[0]
    numbers = [part and int(part[1]) for part in parts]
    assert numbers == list(range(1, len(parts) + 1)), heads


def test_code_is_88_columns_wide():
    report(
        f"{place(cell)}: {len(line)} columns: {line}"
        for cell in CODE
        for line in cell.source.splitlines()
        if len(line) > 88
    )


# The code: plain Python whose definitions can be copied out.


def test_code_is_plain_python():
    report(
        f"{place(cell)}: not Python"
        for cell in CODE
        if cell.source.strip() and not tree_of(cell).body
    )
    report(
        f"{place(cell)}: a shell or magic line: {line}"
        for cell in CODE
        for line in cell.source.splitlines()
        if re.search(r"^[%!?]|\bget_ipython\b", line)
    )


def bound_names(statement):
    """Return (name, whether a loop's) bound by a top-level statement."""
    if isinstance(statement, DEFINITIONS):
        return [(statement.name, False)]
    if isinstance(statement, IMPORTS):
        aliases = [a.asname or a.name for a in statement.names]
        return [(alias.partition(".")[0], False) for alias in aliases]
    names, inner = [], [statement]
    while inner:
        node = inner.pop()
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.For):
            names += [(n, True) for n in stored(node.target)]
            children.remove(node.target)
        elif isinstance(node, DEFINITIONS + IMPORTS):
            names += bound_names(node)
            continue
        elif isinstance(node, ast.Name):
            names += [(n, False) for n in stored(node)]
        comprehended = isinstance(node, ast.comprehension)
        scoped = isinstance(node, ast.Lambda) or comprehended
        inner += [] if scoped else children
    return names


def stored(target):
    """Return the names an assignment target binds."""
    nodes = [n for n in ast.walk(target) if isinstance(n, ast.Name)]
    return [n.id for n in nodes if isinstance(n.ctx, ast.Store)]


def test_what_other_cells_read_is_bound_in_one_cell():
    """So that cells may be run again: scratch names may return, results may not."""
    bound, read = collections.defaultdict(set), collections.defaultdict(set)
    for cell in CODE:
        here = set()
        for statement in tree_of(cell).body:
            if isinstance(statement, IMPORTS):
                continue
            for name in names_used(statement) - here:
                read[name].add(place(cell))
            here |= {name for name, _ in bound_names(statement)}
        for name in here:
            bound[name].add(place(cell))
    report(
        f"{name}, read in {', '.join(read[name])}, is bound in {', '.join(places)}"
        for name, places in bound.items()
        if len(places) > 1 and read[name]
    )


def names_used(statement):
    """Return the names that a statement loads and does not bind by itself first."""
    table = symtable.symtable(ast.unparse(statement), "cell", "exec")
    loop = isinstance(statement, ast.For)
    own = {name for name, of_loop in bound_names(statement) if loop or of_loop}
    return global_names(table) - own


def test_functions_and_classes_have_docstrings():
    report(
        f"{place(cell)}: {node.name} has no docstring"
        for cell in CODE
        for node in ast.walk(tree_of(cell))
        if isinstance(node, DEFINITIONS)
        and not re.match("__.*__$", node.name)
        and not ast.get_docstring(node)
    )


def test_definitions_need_only_definitions_and_constants():
    known, defined = set(vars(builtins)) | {"__class__"}, []
    for cell in CODE:
        for statement in tree_of(cell).body:
            if isinstance(statement, DEFINITIONS):
                defined.append(ast.unparse(statement))
            named = isinstance(statement, (*DEFINITIONS, *IMPORTS, ast.With))
            if named or sets_constants(statement):
                known |= {name for name, _ in bound_names(statement)}
    module = symtable.symtable("\n".join(defined), "notebook", "exec")
    report(
        f"{top.get_name()} uses {name}, which only a run binds"
        for top in module.get_children()
        for name in sorted(global_names(top) - known)
    )


def global_names(table):
    """Return the global names used in a scope and the scopes inside it."""
    symbols = [s for s in table.get_symbols() if s.is_referenced()]
    names = {s.get_name() for s in symbols if s.is_global()}
    return names.union(*map(global_names, table.get_children()))


def test_titles_come_from_the_data():
    """So that a picture of a stand-in never says MNIST."""
    report(
        f"{place(cell)}: take the title from the data set: {node.value!r}"
        for cell in CODE
        for statement in tree_of(cell).body
        for node in ast.walk(statement)
        if isinstance(node, ast.Constant)
        and "MNIST" in str(node.value)
        and node.value not in claims_of(cell)
        and not sets_constants(statement)
        and not isinstance(statement, DEFINITIONS)
    )


# The prose: claims, numbers, words, links.


def test_claims_are_literal_and_unique():
    report(
        f"{place(cell)}: a claim should be a plain string"
        for cell in CODE
        if len(claims_of(cell)) < len(calls_of(cell, "check"))
    )
    counts = collections.Counter(CLAIMS)
    report(f"claimed twice: {c}" for c, n in counts.items() if n > 1)


def test_claims_are_checked_in_the_outputs():
    report(
        f"{place(cell)}: the output lacks 'checked: {claim}'"
        for cell in CODE
        for claim in claims_of(cell)
        if f"checked: {claim}" not in outputs_text(cell).splitlines()
    )


def test_last_table_lists_every_claim():
    """Each in one line with its verdict: long lines are not wrapped."""
    printed = [" ".join(x.split()) for x in outputs_text(CODE[-1]).splitlines()]
    assert printed == [f"checked: {claim}" for claim in CLAIMS]


def findings():
    """Return the claims that the notebook's first part makes."""
    first = [c for c in MARKDOWN if "\nThree things we found:" in c.source]
    assert len(first) == 1
    return bullets(first[0].source)


def test_findings_are_checked_claims():
    assert len(findings()) >= 3
    report(f"no check says: {f}" for f in findings() if f not in CLAIMS)


def test_readme_makes_the_same_claims():
    first = README.partition("\n## ")[0]
    assert bullets(first) == findings()


def test_prose_holds_no_measured_decimals():
    """A decimal stands in a claim or the code, or beside its source's year."""
    stated = {
        number
        for text in [*CLAIMS, *(cell.source for cell in CODE)]
        for number in re.findall(r"\d+\.\d+", text)
    }
    report(
        f"{where}: {number} is neither in a check nor in the code: {line}"
        for where, text in [
            *((place(cell), without_code(cell.source)) for cell in MARKDOWN),
            ("README", without_code(README)),
        ]
        for line in text.splitlines()
        if not re.search(r"\b(19|20)\d\d\b", line)
        for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", line)
        if number not in stated and "Python" not in line
    )


def without_code(markdown):
    """Return Markdown without code and link targets."""
    text = re.sub(r"```.*?```|`[^`]*`", "", markdown, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)|https?://\S+", "", text)


def test_one_word_per_concept():
    banned = {
        "unit": r"\b(neurons?|nodes?)\b",
        "sparsity": r"\b(prun\w+|sparsity) (rate|ratio|level|amount)s?\b"
        r"|\bamounts? of (sparsity|pruning)\b",
    }
    texts = [*((place(cell), cell.source) for cell in BOOK.cells)]
    report(
        f"{where}: say {word}, not {match[0]!r}"
        for where, text in [*texts, ("README", README), ("guide", GUIDE)]
        for word, pattern in banned.items()
        for match in re.finditer(
            pattern, re.sub(r"\[[^\]]*\]\([^)]*\)", "", text), re.IGNORECASE
        )
    )


def links(markdown):
    """Return (whether an image, text, target) of the links in Markdown."""
    pattern = r"(!?)\[((?:!\[[^\]]*\]\([^)]*\)|[^\]])*)\]\(([^)\s]+)\)"
    found = re.findall(pattern, markdown)
    inner = [link for _, text, _ in found for link in links(text)]
    return [*found, *inner]


def test_links_are_https_and_pictures_have_words():
    report(
        f"{place(cell)}: {target}"
        for cell in MARKDOWN
        for _, _, target in links(cell.source)
        if not target.startswith("https://")
    )
    report(
        f"{where}: describe {target}"
        for where, text in [
            ("notebook", all_markdown()),
            ("README", README),
            ("guide", GUIDE),
        ]
        for image, words, target in links(text)
        if image and len(words) < 3
    )


def all_markdown():
    """Return all Markdown of the notebook."""
    return "\n\n".join(cell.source for cell in MARKDOWN)


def test_links_inside_the_repository_exist():
    found = links(README + GUIDE)
    local = [target for _, _, target in found if not target.startswith("https://")]
    report(
        f"there is no {target}"
        for target in local
        if not (ROOT / target.partition("#")[0]).exists()
    )


def test_readme_shows_the_pictures_of_the_notebook():
    drawn = pictures(NOTEBOOK)
    shown = {ROOT / t for image, _, t in links(README) if image and ":" not in t}
    assert shown and shown == set(drawn), "README and outputs: same pictures"
    report(
        f"{path.relative_to(ROOT)} is not the notebook's output: "
        "python tests/update_images.py"
        for path, png in drawn.items()
        if not path.is_file() or path.read_bytes() != png
    )


def test_badges_lead_to_this_repository():
    def badges(text):
        return [t for _, words, t in links(text) if words.startswith("![")]

    assert badges(README) == badges(all_markdown()), "two sets of badges"
    named = set(REPOSITORY.findall(README + all_markdown()))
    remote = subprocess.run(
        ["git", "-C", str(ROOT), "remote", "get-url", "origin"],
        capture_output=True,
        text=True,
    )
    url = re.search(r"github\.com[:/](.+?)(\.git)?/?$", remote.stdout.strip())
    here = {url[1]} if url else named
    command = re.search("^perl -pi .*$", GUIDE, re.MULTILINE)[0]
    assert len(named) == 1 and named == here, f"{named} should be {here}: {command}"
