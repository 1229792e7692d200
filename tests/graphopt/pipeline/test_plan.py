"""Plans as JSON."""

from __future__ import annotations

import json
import math

from graphopt.pipeline.plan import Plan


def test_a_plan_with_numbers_that_json_has_not_reads_back_as_it_was_written() -> None:
    plan = Plan(pass_name="toy", measured={"ridge": math.inf, "losses": [math.nan, 1.0]})
    written = json.dumps(plan.to_json(), allow_nan=False)
    assert json.loads(written)["measured"] == {"ridge": None, "losses": [None, 1.0]}
    assert Plan.from_json(json.loads(written), {}).to_json() == plan.to_json()
