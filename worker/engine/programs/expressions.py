"""The grammar of symbolic sizes: torch evaluates these strings as Python; each is parsed, checked and written anew."""

import ast
import math
import re
from typing import NoReturn

from worker.engine.programs.rejections import reject, shown

SYMBOL = re.compile(r"s[0-9]{1,6}")
_MAX_LENGTH, _MAX_NODES, _MAX_TERMS = 10_000, 1_000, 64
"""Of one expression. sympy looks for common factors, and the time for that grows with powers of the last."""
_FUNCTIONS = {
    *("Add", "Mul", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "ModularIndexing"),
    *("IntTrueDiv", "FloatTrueDiv", "CeilToInt", "FloorToInt", "TruncToInt", "TruncToFloat", "RoundToInt", "ToFloat"),
    *("Equality", "Unequality", "StrictGreaterThan", "StrictLessThan", "GreaterThan", "LessThan", "And", "Or", "Not"),
    *("floor", "ceiling", "Identity", "Where"),
}
_POWERS = {"Pow", "PowByNatural"}
_CONSTANTS = {"true", "false"}


def rebuild_expression(text: str, where: str) -> tuple[str, int]:
    """Return an expression of the same meaning that contains nothing but known functions, symbols and integers.

    The number is that of its terms when it is multiplied out, at most.
    """
    if len(text) > _MAX_LENGTH:
        reject("bad_expression", f"{where}: the size expression has {len(text)} characters; at most {_MAX_LENGTH}.")
    try:
        tree = ast.parse(text, mode="eval").body
        if sum(1 for _ in ast.walk(tree)) > _MAX_NODES:
            reject("bad_expression", f"{where}: the size expression has more than {_MAX_NODES} parts.")
        rebuilt = _Writer(text, where).write(tree, inside_power=False)
        if (terms := _count_terms(tree)) > _MAX_TERMS:
            reject("bad_expression", f"{where}: {shown(text)} has {terms} terms; at most {_MAX_TERMS} are taken.")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        reject("bad_expression", f"{where}: {shown(text)} is not a size expression.")
    return rebuilt, terms


def _count_terms(node: ast.expr) -> int:
    """Return how many terms a part of a written expression has when it is multiplied out, at most."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return 1
    terms = [_count_terms(part) for part in node.args]
    match node.func.id:
        case "Add":
            return sum(terms)
        case "Mul":
            return math.prod(terms)
        case name if name in _POWERS:
            exponent = ast.literal_eval(node.args[1].args[0])  # type: ignore[attr-defined]
            return int(terms[0] ** abs(exponent))
    return max(terms, default=1)


class _Writer:
    def __init__(self, text: str, where: str) -> None:
        self._text, self._where = text, where

    def write(self, node: ast.expr, *, inside_power: bool) -> str:
        if isinstance(node, ast.Name) and node.id in _CONSTANTS:
            return node.id
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            self._refuse()
        name = node.func.id
        if name == "Symbol":
            return self._symbol(node)
        if node.keywords:
            self._refuse()
        if name == "Integer" and len(node.args) == 1:
            return f"Integer({self._integer(node.args[0])})"
        if name == "Rational" and len(node.args) == 2:
            return f"Rational({self._integer(node.args[0])}, {self._integer(node.args[1], low=1)})"
        if name in _FUNCTIONS and node.args:
            return f"{name}({', '.join(self.write(part, inside_power=inside_power) for part in node.args)})"
        # Powers of powers grow without bound when evaluated.
        if name in _POWERS and len(node.args) == 2 and not inside_power:
            exponent = node.args[1]
            if isinstance(exponent, ast.Call) and isinstance(exponent.func, ast.Name) and exponent.func.id == "Integer":
                size = self._integer(exponent.args[0] if exponent.args else exponent, low=-4, high=8)
                return f"{name}({self.write(node.args[0], inside_power=True)}, Integer({size}))"
        return self._refuse()

    def _symbol(self, node: ast.Call) -> str:
        flags = {keyword.arg: keyword.value for keyword in node.keywords}
        known = all(
            name in ("positive", "nonnegative", "integer") and isinstance(value, ast.Constant) and value.value is True
            for name, value in flags.items()
        )
        if len(node.args) != 1 or not isinstance(node.args[0], ast.Constant) or not known:
            self._refuse()
        name = node.args[0].value
        if not isinstance(name, str) or not SYMBOL.fullmatch(name):
            reject(
                "data_dependent_size",
                f"{self._where}: the size {shown(name)} is not the size of an input; sizes that depend on values "
                "cannot be imported.",
                "Rewrite the model so that no tensor's size depends on the values of another.",
            )
        assumptions = "".join(f", {flag}=True" for flag in ("positive", "nonnegative", "integer") if flag in flags)
        return f"Symbol({name!r}{assumptions})"

    def _integer(self, node: ast.expr, low: int = -(2**63), high: int = 2**63 - 1) -> int:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            sign, node = -1, node.operand
        if not isinstance(node, ast.Constant) or type(node.value) is not int or not low <= sign * node.value <= high:
            self._refuse()
        return int(sign * node.value)

    def _refuse(self) -> NoReturn:
        reject("bad_expression", f"{self._where}: {shown(self._text)} is not a size expression.")
