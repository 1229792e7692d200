"""The grammar of size expressions: what torch writes passes, what Python could run does not."""

from __future__ import annotations

import pytest

from graphopt.loading.expressions import check_expression, check_expressions
from graphopt.loading.refusal import HostileError


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(8), Max(Integer(1), Add(Symbol('s0', positive=True, integer=True), Integer(-2))))",
        "FloorDiv(Add(Symbol('u0', integer=True), Integer(1)), Integer(2))",
        "Pow(Symbol('s0', positive=True, integer=True), Integer(2))",
        "Mul(Float('0.5', precision=53), ToFloat(Symbol('s0')))",
        "Mul(Rational(1, 2), Symbol('s0'))",
        "s77 + 1", "-s0//2", "s0*s1 % 8", "s0**2", "Max(1, s0 - 2)", "Eq(s0, 2)", "s0 >= 2", "True",
    ],
)  # fmt: skip
def test_sizes_pass(text: str) -> None:
    check_expression(text)


SYMBOLS = ", ".join(f"s{n}" for n in range(30))
SUM = SYMBOLS.replace(",", " +")


def test_a_long_sum_passes() -> None:
    check_expression(SUM)


def test_expressions_are_bounded_together() -> None:
    check_expressions([f"{SUM} + {n}" for n in range(100)])
    with pytest.raises(HostileError, match="terms together"):
        check_expressions([f"{SUM} + {n}" for n in range(1000)])
    few = ", ".join(f"s{n}" for n in range(12))
    with pytest.raises(HostileError, match="terms together"):
        check_expressions([f"Max({few}) + {n}" for n in range(150)])


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "().__class__", "[x for x in (1,)]", "lambda: 0", "s0[0]", "s0.real",
        "print(1)", "eval('1')", "Symbol('__import__')", "Symbol(s0)", "Symbol('s0', integer=print(1))",
        "Symbol('s0', **{})", "Max(*s0)", "(yield)", "s0 if s1 else s2", "f'{s0}'", "'text'", "os", "E1x",
        "9**9**9", "Pow(Pow(s0, 64), 64)", "2**s0", "LShift(1, 10000000000)", "Float('0.5', precision=1000000000)",
        "Integer('__import__')", "1" * 50, "s0 + 1\n", "s0 # comment", "s0 := 1", "", "s0 +", "(" * 5000 + ")" * 5000,
        "s0 + " * 10000 + "s0", "ſ0", "u1000000", f"Max({SYMBOLS})", f"And({SYMBOLS})", f"(({SUM}) ** 64) % 7",
        f"Mod(Pow(Add({SYMBOLS}), Integer(64)), Integer(7))", f"({SUM}) * ({SUM})", f"({SUM}) ** 2",
        "(s0 + s1) ** 7", " < ".join(f"s{n}" for n in range(20)),
    ],
)  # fmt: skip
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(HostileError, match="not integer arithmetic"):
        check_expression(text)
