"""The committed notebook and the README keep to the house style."""

import ast
import builtins
import collections
import re
import statistics
import subprocess
import symtable

import nbformat
import pytest
from update_images import NOTEBOOK, ROOT, pictures

BOOK = nbformat.read(NOTEBOOK, as_version=4)
CODE = [cell for cell in BOOK.cells if cell.cell_type == "code"]
MARKDOWN = [cell for cell in BOOK.cells if cell.cell_type == "markdown"]
README = (ROOT / "README.md").read_text(encoding="utf-8")

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


def bare(markdown):
    """Return Markdown text without tables, images, targets, code, URLs."""
    text = re.sub(r"^\s*\|.*$", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"`[^`]*`|<?https?://\S+", "", text)


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
    """Return the bullet points of a Markdown text, unwrapped."""
    points = re.findall(r"^[-*] (.+(?:\n {2,}\S.*)*)", markdown, re.MULTILINE)
    return [" ".join(point.replace("**", "").split()) for point in points]


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


def in_parts():
    """Return (code cell, heading of the part it stands in)."""
    heads, pairs = [""], []
    for cell in BOOK.cells:
        if cell.cell_type == "markdown":
            heads += headings(cell)
        else:
            pairs.append((cell, heads[-1].lstrip("# ")))
    return pairs


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


def test_metadata_of_cells_are_tags_only():
    report(
        f"{place(cell)}: metadata {sorted(cell.metadata)}: only tags belong "
        "there (execute with record_timing=False)"
        for cell in BOOK.cells
        if set(cell.metadata) - {"tags"}
    )


def test_outputs_are_of_the_real_data():
    report(
        f"{place(cell)}: speaks of a stand-in; run it on the real data"
        for cell in CODE
        if "stand-in" in outputs_text(cell)
    )


# The story: prose first, short cells, numbered parts.


def test_code_is_led_in_by_prose():
    pairs = zip([None, *BOOK.cells], BOOK.cells)
    bare_cells = [
        cell
        for before, cell in pairs
        if cell.cell_type == "code"
        and not (before in MARKDOWN and has_prose(before))
    ]
    if len(bare_cells) > 0.05 * len(CODE):
        report(f"{place(cell)}: no prose before it" for cell in bare_cells)


def test_never_more_than_two_code_cells_in_a_row():
    kinds = "".join(cell.cell_type[0] for cell in BOOK.cells)
    report(
        f"{place(BOOK.cells[match.start()])}: starts a row of code cells"
        for match in re.finditer("ccc+", kinds)
    )


def test_every_picture_is_followed_by_prose():
    after = zip(BOOK.cells, [*BOOK.cells[1:], None])
    report(
        f"{place(cell)}: no sentence after the picture says what it shows"
        for cell, following in after
        if any(
            "image/png" in o.get("data", {}) for o in cell.get("outputs", [])
        )
        and not (following in MARKDOWN and has_prose(following))
    )


def test_parts_are_numbered():
    heads = [head for cell in MARKDOWN for head in headings(cell)]
    titles = [head for head in heads if head.startswith("# ")]
    parts = [re.match(r"## (\d+)\. ", h) for h in heads if h not in titles]
    assert len(titles) == 1 and heads[0] == titles[0]
    numbers = [part and int(part[1]) for part in parts]
    assert numbers == list(range(1, len(parts) + 1)), heads


def test_markdown_cells_have_at_most_120_words():
    counts = {
        place(cell): len(re.findall(r"\S*\w\S*", bare(cell.source)))
        for cell in MARKDOWN
    }
    report(f"{cell}: {n} words" for cell, n in counts.items() if n > 120)


def test_code_cells_are_short():
    lines = [
        [line for line in cell.source.splitlines() if line.strip()]
        for cell in CODE
    ]
    report(
        f"{place(cell)}: {len(rows)} lines, 25 is the limit"
        for cell, rows in zip(CODE, lines)
        if len(rows) > 25
    )
    lengths = [len(rows) for rows in lines]
    assert statistics.median(lengths) <= 11
    assert statistics.quantiles(lengths, n=10, method="inclusive")[-1] <= 17


def test_code_is_79_columns_wide():
    report(
        f"{place(cell)}: {len(line)} columns: {line}"
        for cell in CODE
        for line in cell.source.splitlines()
        if len(line) > 79
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


def kind_of(statement):
    """Say what a top-level statement does: import, define, set or run."""
    if isinstance(statement, ast.With):
        return kind_of(statement.body[0])
    if isinstance(statement, IMPORTS):
        return "import"
    if isinstance(statement, DEFINITIONS):
        return "define"
    names = [name for name, _ in bound_names(statement)]
    assigned = isinstance(statement, ast.Assign | ast.AnnAssign)
    if assigned and names and all(name.isupper() for name in names):
        return "set constants"
    return "run"


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


def test_cells_define_or_set_or_run():
    kinds = {place(c): {kind_of(s) for s in tree_of(c).body} for c in CODE}
    report(
        f"{cell}: {' and '.join(sorted(found))} in one cell"
        for cell, found in kinds.items()
        if len(found) > 1
    )


def test_names_are_bound_once():
    once, loops = collections.defaultdict(list), collections.defaultdict(set)
    for cell in CODE:
        for statement in tree_of(cell).body:
            submodule = isinstance(statement, ast.Import)  # a.b and a.c: a
            for name, of_loop in bound_names(statement):
                if of_loop:
                    loops[name].add(place(cell))
                elif not (submodule and once[name]) and name.strip("_"):
                    once[name].append(place(cell))
    report(
        f"{name} is bound in " + ", ".join([*places, *loops[name]])
        for name, places in once.items()
        if len(places) + len(loops[name]) > 1
    )


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
            kind = kind_of(statement)
            if kind == "define":
                defined.append(ast.unparse(statement))
            if kind != "run":
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
        and not kind_of(statement) == "set constants"
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


def test_ledgers_are_begun_in_their_parts():
    """Each once, under the part's heading, before the first check."""
    begun, faults = [], []
    for cell, part in in_parts():
        for call in calls_of(cell, "begin", "check"):
            if call.func.id == "begin":
                begun.append(ast.literal_eval(call.args[0]))
                if begun[-1] != part or part in begun[:-1]:
                    faults.append(f"{place(cell)}: begin {part!r}, and once")
            elif part not in begun:
                faults.append(f"{place(cell)}: no begin({part!r}) before")
    report(faults)


def test_last_table_lists_every_claim_and_its_part():
    """Each in one line with its verdict: long lines are not wrapped."""
    claims = [(part, c) for cell, part in in_parts() for c in claims_of(cell)]
    rows = [f"{i} {part} {c} checked" for i, (part, c) in enumerate(claims)]
    tables = [o.data["text/plain"] for o in CODE[-1].outputs if "data" in o]
    lines = [" ".join(x.split()) for t in tables for x in t.splitlines()]
    assert lines == ["part claim verdict", *rows]


def findings():
    """Return the claims that the notebook's first part makes."""
    first = [c for c in MARKDOWN if c.source.startswith("## 1. What we find")]
    assert len(first) == 1, "there is one cell '## 1. What we find'"
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
        for where, text in [*texts, ("README", README)]
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
        for where, text in [("notebook", all_markdown()), ("README", README)]
        for image, words, target in links(text)
        if image and len(words) < 3
    )


def all_markdown():
    """Return all Markdown of the notebook."""
    return "\n\n".join(cell.source for cell in MARKDOWN)


def test_links_inside_the_repository_exist():
    local = [t for _, _, t in links(README) if not t.startswith("https://")]
    local += re.findall(r"HEAD/(images/[^)\s]+)", all_markdown())
    report(
        f"there is no {target}"
        for target in local
        if not (ROOT / target.partition("#")[0]).exists()
    )


def test_readme_shows_the_pictures_of_the_notebook():
    drawn = pictures(NOTEBOOK)
    shown = {
        ROOT / t for image, _, t in links(README) if image and ":" not in t
    }
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
    command = re.search("^perl -pi .*$", README, re.MULTILINE)[0]
    assert len(named) == 1 and named == here, (
        f"{named} should be {here}: {command}"
    )
