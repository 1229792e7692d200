"""The integer expressions that a size in an exported program may be, checked before sympy evaluates them.

`torch.export.load` hands every `expr_str` to `sympy.sympify`, which runs it through Python's `eval`
(torch/_export/serde/serialize.py, `_parse_sym_expr`; sympy's documentation warns of it). torch writes them as
`Add(Symbol('s77', positive=True, integer=True), Integer(-2))`. This grammar admits those and plain infix
arithmetic over symbols, and nothing that can name an attribute, an item or another function:

    expr   := number | True | False | symbol | Symbol('symbol', assumption=bool, ..) | FUNCTION(expr, ..)
            | expr (+ - * / // % **) expr | (+ -) expr | expr (< <= == != >= >) expr | expr (& '|') expr
    symbol := lower-case letters, then digits: s77, u0, zf1
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Iterable, Sequence

from graphopt.errors import cut
from graphopt.loading.refusal import HostileError

MAX_LENGTH = 20_000
# Exponents and shifts beyond this build numbers no size can be, and cost memory doing so.
MAX_EXPONENT = 64
MAX_DIGITS = 20
MAX_PRECISION = 4096
# sympy multiplies powers of sums out, and compares each part of a maximum or a condition with each other one.
MAX_TERMS = 100
MAX_COMPARED = 12
# Of one file's expressions those of more than a few terms, together: a large one takes sympy 50 ms.
MAX_TERMS_OF_FILE = 20_000
_FEW_TERMS, _FEW_COMPARED = 8, 3
_TERMS_PER_COMPARED = 20

_SYMBOL = re.compile(r"[a-z]{1,8}\d{1,6}")  # torch counts up to the highest number of a symbol, one by one
_DIGITS = re.compile(r"-?\d{1,20}(\.\d{0,60})?([eE][+-]?\d{1,3})?")
_CHARACTERS = re.compile(r"[A-Za-z0-9_ ()',=.+\-*/%<>!&|]+")
_NUMBERS = frozenset({"Integer", "Float", "Rational"})
_FUNCTION_NAMES = """
    Add Mul Pow Max Min Abs Eq Ne Lt Le Gt Ge Equality Unequality StrictLessThan LessThan StrictGreaterThan
    GreaterThan And Or Not Piecewise ExprCondPair Tuple floor ceiling sqrt FloorDiv ModularIndexing Where
    PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv
    IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat Identity
"""
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
_NAMES = frozenset({"oo", "int_oo", "true", "false"})
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.BitAnd, ast.BitOr)
_COMPARING = frozenset(["And", "ExprCondPair", "Max", "Min", "Not", "Or", "Piecewise", "Where"])
_COMPARISONS = (ast.Lt, ast.LtE, ast.Eq, ast.NotEq, ast.GtE, ast.Gt)


@functools.lru_cache(maxsize=65_536)
def check_expression(text: str) -> None:
    """Raise `HostileError` unless `text` is an expression of the grammar above."""
    if len(text) > MAX_LENGTH or not _CHARACTERS.fullmatch(text):
        raise _refused(text)
    try:
        tree = ast.parse(text, mode="eval")
        _check(tree.body, text)
        compared = sum(map(_compared, ast.walk(tree.body)))
        if compared > MAX_COMPARED or _terms(tree.body) > MAX_TERMS:
            raise _refused(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
        raise _refused(text) from err


def check_expressions(texts: Iterable[str]) -> None:
    """Raise `HostileError` if the expressions of a file, each of which was checked, are together too many.

    Args:
        texts: each expression once.
    """
    total = 0
    for text in texts:
        body = ast.parse(text, mode="eval").body
        terms, compared = _terms(body), sum(map(_compared, ast.walk(body)))
        total += terms * (terms > _FEW_TERMS) + _TERMS_PER_COMPARED * compared * (compared > _FEW_COMPARED)
    if total > MAX_TERMS_OF_FILE:
        raise HostileError(f"its size expressions have {total} terms together, more than any model's")


def _terms(node: ast.expr) -> int:
    """Return how many terms an expression has at most once it is multiplied out; at most somewhat over the limit."""
    match node:
        case ast.UnaryOp(operand=operand):
            return _terms(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(left, right)
        case ast.BinOp(left=left, op=operator, right=right):
            return _terms(left) + _terms(right) if isinstance(operator, ast.Add | ast.Sub) else _product((left, right))
        case ast.Compare(left=left, comparators=others):
            return sum(map(_terms, (left, *others)))
        case ast.Call(func=ast.Name(id=name), args=[base, exponent]) if name in _POWERS:
            return _power(base, exponent)
        case ast.Call(func=ast.Name(id="Mul"), args=args):
            return _product(args)
        case ast.Call(func=ast.Name(id=name), args=args) if name not in _NUMBERS:
            return max(1, sum(map(_terms, args)))
    return 1


def _product(factors: Sequence[ast.expr]) -> int:
    result = 1
    for factor in factors:
        result = min(result * _terms(factor), MAX_TERMS + 1)
    return result


def _power(base: ast.expr, exponent: ast.expr) -> int:
    """Return how many terms a power has, whose exponent is a number."""
    numbers = [float(str(node.value)) for node in ast.walk(exponent) if isinstance(node, ast.Constant)]
    terms, times = _terms(base), math.ceil(max(numbers, default=1))
    return 1 if terms == 1 else MAX_TERMS + 1 if times > MAX_TERMS else min(int(terms**times), MAX_TERMS + 1)


def _compared(node: ast.AST) -> int:
    match node:
        case ast.Call(func=ast.Name(id=name), args=args) if name in _COMPARING:
            return len(args)
        case ast.Compare(comparators=others):
            return len(others)
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            return 1
    return 0


def is_symbol(text: str) -> bool:
    """Tell whether `text` is the name of a size symbol, such as `s77`."""
    return _SYMBOL.fullmatch(text) is not None


def _refused(text: str) -> HostileError:
    return HostileError(f"it holds the size expression {cut(text, 80)!r}, which is not integer arithmetic over sizes")


def _check(node: ast.expr, text: str, in_power: bool = False) -> None:
    match node:
        case ast.Constant(value=bool()):
            return
        case ast.Constant(value=int() | float()) if _is_literal(node):
            return
        case ast.Name(id=name) if is_symbol(name) or name in _NAMES:
            return
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            _check(operand, text, in_power)
            return
        case ast.BinOp(left=left, op=operator, right=right) if isinstance(operator, _OPERATORS):
            if isinstance(operator, ast.Pow):
                _check_power(left, right, text, in_power)
                return
            _check(left, text, in_power)
            _check(right, text, in_power)
            return
        case ast.Compare(left=left, ops=operators, comparators=others) if all(
            isinstance(operator, _COMPARISONS) for operator in operators
        ):
            for part in (left, *others):
                _check(part, text, in_power)
            return
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            _check_call(name, args, keywords, text, in_power)
            return
    raise _refused(text)


def _check_call(name: str, args: list[ast.expr], keywords: list[ast.keyword], text: str, in_power: bool) -> None:
    if name == "Symbol":
        _check_symbol(args, keywords, text)
    elif name in _NUMBERS:
        _check_number(name, args, keywords, text)
    elif name in _POWERS and len(args) == 2 and not keywords:
        _check_power(args[0], args[1], text, in_power)
    elif name in _FUNCTIONS - _POWERS and not keywords:
        for arg in args:
            _check(arg, text, in_power)
    else:
        raise _refused(text)


def _check_symbol(args: list[ast.expr], keywords: list[ast.keyword], text: str) -> None:
    match args:
        case [ast.Constant(value=str(name))] if is_symbol(name):
            pass
        case _:
            raise _refused(text)
    for keyword in keywords:
        if keyword.arg is None or not isinstance(keyword.value, ast.Constant):
            raise _refused(text)
        if type(keyword.value.value) is not bool:
            raise _refused(text)


def _check_number(name: str, args: list[ast.expr], keywords: list[ast.keyword], text: str) -> None:
    """Check `Integer(-2)`, `Rational(1, 2)` and `Float('0.5', precision=53)`."""
    rest = [*args[1:], *(keyword.value for keyword in keywords)]
    # A Float's second value is its precision: how many digits sympy will compute with.
    limit = MAX_PRECISION if name == "Float" else 10**MAX_DIGITS
    good = bool(args) and _is_literal(args[0]) and len(rest) <= (0 if name == "Integer" else 1)
    for value in rest:
        good = good and isinstance(value, ast.Constant) and type(value.value) is int and value.value <= limit
    if not good:
        raise _refused(text)


def _is_literal(node: ast.expr) -> bool:
    value = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else node
    return isinstance(value, ast.Constant) and (
        (type(value.value) in (int, float) and len(str(value.value)) <= MAX_DIGITS + 10)
        or (isinstance(value.value, str) and _DIGITS.fullmatch(value.value) is not None)
    )


def _check_power(base: ast.expr, exponent: ast.expr, text: str, in_power: bool) -> None:
    """Admit one level of powers with a small literal exponent: towers of powers exhaust memory."""
    value = exponent
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in _NUMBERS:
        _check(value, text)
        value = value.args[0]
    if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub):
        value = value.operand
    if in_power or not (
        isinstance(value, ast.Constant) and isinstance(value.value, int | float) and value.value <= MAX_EXPONENT
    ):
        raise _refused(text)
    _check(base, text, in_power=True)
