"""Which results make a claim false? This runs in the kernel that runs the notebook."""

import ast
import itertools
import json
import re

import numpy as np


def call(name, node, constant):
    """Return the call of a function with a node and a constant."""
    return ast.Call(ast.Name(name, ast.Load()), [node, ast.Constant(constant)], [])


class Marked(ast.NodeTransformer):
    """Let a condition read results by `_of(value, text)`, bounds by `_far(x, sign)`."""

    outer = True

    def visit_Compare(self, node):
        """Move the bounds of a comparison that stands in no other one."""
        self.outer, outer, links = False, self.outer, []
        terms = [*map(self.visit, (node.left, *node.comparators))]
        self.outer = outer
        for left, kind, right in zip(terms, node.ops, terms[1:]):
            sign = {"L": 1, "G": -1}.get(type(kind).__name__[0])
            bound = call("_far", right, sign) if outer and sign else right
            links.append(ast.Compare(left, [kind], [bound]))
        return ast.BoolOp(ast.And(), links) if len(links) > 1 else links[0]

    def visit_Name(self, node):
        """Mark a name, with all that is picked from it, or a call."""
        root, text = node, ast.unparse(node)
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        if isinstance(node, ast.Call):
            node.args = [*map(self.visit, node.args)]
            if isinstance(node.func, ast.Attribute):
                node.func.value = self.visit(node.func.value)
        picked = isinstance(root, ast.Name) or root is node
        return call("_of", node, text) if picked else self.generic_visit(node)

    visit_Attribute = visit_Subscript = visit_Call = visit_Name


def numbers(value):
    """Return a result as an array of numbers or bools, None if it is something else."""
    if isinstance(value, list | type({}.values())):
        value = np.array([*value])
    if hasattr(value, "axes"):
        value = value.to_numpy(float)
    if isinstance(value, np.ndarray | np.generic | int | float):
        return np.array(value) if np.array(value).dtype.kind in "biuf" else None


def changed(value, together):
    """Yield copies of a result, one number or all of them far up, far down, tiny."""
    array = numbers(value)
    places = [...] if together else itertools.islice(np.ndindex(array.shape), 1000)
    for place, new in itertools.product(places, (1e15, -1e15, 1e-30)):
        own = array.astype(bool if array.dtype == bool else float)
        own[place] = new > 1 if array.dtype == bool else new
        yield type(value)(own, *value.axes) if hasattr(value, "axes") else own[()]


def blunt(claim, condition, names):
    """Return the results in a claim's condition that cannot make it false.

    One number of each result should, even if all bounds are generous. Where a claim is
    about one or some of many, or a median, all numbers of a result together should.
    """
    tree, seen = Marked().visit(ast.parse(condition, mode="eval")), {}
    code = compile(ast.fix_missing_locations(tree), "<condition>", "eval")

    def holds(far, other):
        """Judge the condition on other results, with bounds that are far away."""
        own = {"_far": lambda value, sign: np.add(value, sign * far)}
        own["_of"] = lambda v, text: seen.update({text: v}) or other.get(text, v)
        return bool(eval(code, {**names, **own}))

    faults = [] if holds(1e9, {}) else ["the condition cannot be met"]
    results = {text: v for text, v in seen.items() if numbers(v) is not None}
    for text, value in results.items():
        inner = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.expr)]
        if text.endswith(")") and results.keys() & {*map(ast.unparse, inner[1:])}:
            continue  # it is calculated from other results
        some = re.search("(one|three) class", claim) or ".median()" in condition
        some = bool(some) or numbers(value).dtype == bool
        judged = [holds(1e9 * (not some), {text: v}) for v in changed(value, some)]
        if all(judged) or (some and not any([holds(0, {}), *judged])):
            faults.append(text)
    return faults


def recording(check, names, conditions, path):
    """Return a `check` that also notes, in a file, which results change nothing."""

    def recorded(claim, holds, **needs):
        """Check the claim, then its condition."""
        check(claim, holds, **needs)
        with np.errstate(all="ignore"), open(path, "a", encoding="utf-8") as file:
            faults = blunt(claim, conditions[claim], names)
            faults += [] if isinstance(holds, bool | np.bool_) else [type(holds)]
            print(json.dumps([claim, str(faults)]), file=file)

    return recorded
