"""The JSON of an exported program, rebuilt from only what is known to be harmless.

torch checks neither types nor names when it reads `models/*.json` (torch/_export/serde/serialize.py of 2.13),
and many a string in it ends up being run:

    expr_str                    evaluated by sympy                               `expressions`
    keys of range_constraints   compared with such expressions, counted up to    `expressions`
    node targets                looked up from `torch` and called                `operators`
    guards_code                 pasted into source that is run by `exec`         dropped (they are assertions)
    in_spec, out_spec           import modules                                   `treespecs`
    names of values, keywords   become names in the source of the module         must be identifiers
    names of parameters         pasted between quotes into the same source       no quotes or control codes
    custom objects              unpickled                                        refused
    source_fn_stack             looked up from `torch`                           dropped
    devices                     may not be here                                  the CPU

Fields that torch's schema does not have are dropped, as torch does. One table per record, in the schema's
order (torch/_export/serde/schema.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from graphopt.loading.expressions import check_expressions
from graphopt.loading.json_fields import (
    Clean,
    array,
    boolean,
    empty,
    expression,
    integer,
    json_text,
    mapping,
    name,
    no_operator,
    nullable,
    number,
    on_the_cpu,
    operator,
    optional_name,
    path,
    record,
    shown,
    text,
    union,
)
from graphopt.loading.refusal import DamagedError, HostileError
from graphopt.loading.treespecs import check_treespec


def clean_program(value: Any) -> dict[str, Any]:
    """Return a harmless copy of an exported program's JSON; raises `HostileError` or `DamagedError`."""
    try:
        program = _program(value)
        check_expressions(set(_expressions(program)))
        return {**program, "guards_code": []}
    except RecursionError as err:
        raise DamagedError("its program is nested deeper than any model's") from err


def _expressions(value: Any) -> Iterator[str]:
    """Yield the size expressions of a program."""
    if isinstance(value, dict):
        if isinstance(value.get("expr_str"), str):
            yield value["expr_str"]
        for item in value.values():
            yield from _expressions(item)
    elif isinstance(value, list):
        for item in value:
            yield from _expressions(item)


def clean_payloads(value: Any, prefix: str) -> dict[str, Any]:
    """Return a harmless copy of `*_weights_config.json` or `*_constants_config.json`.

    Args:
        value: The parsed JSON.
        prefix: How the name of a payload's file must start: `weight_` or `tensor_`.
    """

    def payload(item: Any) -> Any:
        if isinstance(item, dict) and item.get("use_pickle") is not False:
            raise HostileError(f"its tensor file {shown(item.get('path_name'))} is a pickle")
        clean = _payload(item)
        number = clean["path_name"].removeprefix(prefix)
        if not clean["path_name"].startswith(prefix) or not (number.isascii() and number.isdecimal()):
            raise HostileError(f"it takes tensors from {shown(clean['path_name'])}, which is not a tensor file")
        return clean

    return record({"config": mapping(path, payload)})(value)  # type: ignore[no-any-return]


_hint = union({"as_int": integer, "as_bool": boolean, "as_float": number})
_expression = record({"expr_str": expression}, {"hint": nullable(_hint)})
_sym_int = union({"as_expr": _expression, "as_int": integer})
_sym_float = union({"as_expr": _expression, "as_float": number})
_sym_bool = union({"as_expr": _expression, "as_bool": boolean})
_device = record({"type": on_the_cpu})


def _tensor_meta(size: Clean) -> Clean:
    return record(
        {
            "dtype": integer,
            "sizes": array(size),
            "requires_grad": boolean,
            "device": _device,
            "strides": array(size),
            "storage_offset": size,
            "layout": integer,
        }
    )


_sym_int_argument = union({"as_name": name, "as_int": integer})
_sym_float_argument = union({"as_name": name, "as_float": number})
_sym_bool_argument = union({"as_name": name, "as_bool": boolean})
_tensor = record({"name": name})
_optional_tensor = union({"as_tensor": _tensor, "as_none": boolean})


def _argument(value: Any) -> Any:
    return _ARGUMENT(value)


def _graph(value: Any) -> Any:
    return _GRAPH(value)


_ARGUMENT = union(
    {
        "as_none": boolean,
        "as_tensor": _tensor,
        "as_tensors": array(_tensor),
        "as_int": integer,
        "as_ints": array(integer),
        "as_float": number,
        "as_floats": array(number),
        "as_string": text,
        "as_strings": array(text),
        "as_sym_int": _sym_int_argument,
        "as_sym_ints": array(_sym_int_argument),
        "as_scalar_type": integer,
        "as_memory_format": integer,
        "as_layout": integer,
        "as_device": _device,
        "as_bool": boolean,
        "as_bools": array(boolean),
        "as_sym_bool": _sym_bool_argument,
        "as_sym_bools": array(_sym_bool_argument),
        "as_graph": record({"name": name, "graph": _graph}),
        "as_optional_tensors": array(_optional_tensor),
        "as_operator": no_operator,
        "as_sym_float": _sym_float_argument,
        "as_sym_floats": array(_sym_float_argument),
        "as_optional_tensor": _optional_tensor,
        "as_complex": record({"real": number, "imag": number}),
        "as_nested_tensors": array(array(_tensor)),
        "as_int_lists": array(array(integer)),
        "as_string_to_argument": mapping(text, _argument),
        "as_float_lists": array(array(number)),
    }
)
_metadata = record(
    {},
    {"stack_trace": text, "nn_module_stack": text, "torch_fn": text, "custom": json_text, "from_node": json_text},
)
_AUTOCAST = "torch.ops.higher_order.wrap_with_autocast"
_NODE = record(
    {
        "target": operator,
        "inputs": array(record({"name": optional_name, "arg": _argument}, {"kind": nullable(integer)})),
        "outputs": array(_argument),
        "metadata": _metadata,
    },
    {"is_hop_single_tensor_return": nullable(boolean), "name": nullable(name)},
)


def _node(value: Any) -> Any:
    node = _NODE(value)
    if node["target"] == _AUTOCAST and node["inputs"]:
        node["inputs"][0]["arg"] = {"as_string": "cpu"}  # the type of device, as text
    return node


_GRAPH = record(
    {
        "inputs": array(_argument),
        "outputs": array(_argument),
        "nodes": array(_node),
        "tensor_values": mapping(name, _tensor_meta(_sym_int)),
        "sym_int_values": mapping(name, _sym_int),
        "sym_bool_values": mapping(name, _sym_bool),
    },
    {
        "is_single_tensor_return": boolean,
        "custom_obj_values": empty,
        "sym_float_values": mapping(name, _sym_float),
    },
)
_constant = union({"as_none": boolean, "as_int": integer, "as_float": number, "as_string": text, "as_bool": boolean})
_token = record({"arg": _tensor})
_input_spec = union(
    {
        "user_input": record({"arg": _argument}),
        "parameter": record({"arg": _tensor, "parameter_name": path}),
        "buffer": record({"arg": _tensor, "buffer_name": path, "persistent": boolean}),
        "tensor_constant": record({"arg": _tensor, "tensor_constant_name": path}),
        "token": _token,
        "constant_input": record({"name": optional_name, "value": _constant}),
    }
)
_output_spec = union(
    {
        "user_output": record({"arg": _argument}),
        "loss_output": _token,
        "buffer_mutation": record({"arg": _tensor, "buffer_name": path}),
        "gradient_to_parameter": record({"arg": _tensor, "parameter_name": path}),
        "gradient_to_user_input": record({"arg": _tensor, "user_input_name": path}),
        "user_input_mutation": record({"arg": _tensor, "user_input_name": path}),
        "token": _token,
        "parameter_mutation": record({"arg": _tensor, "parameter_name": path}),
    }
)
_call_signature = record(
    {
        "inputs": array(_argument),
        "outputs": array(_argument),
        "in_spec": check_treespec,
        "out_spec": check_treespec,
    },
    {"forward_arg_names": nullable(array(name))},
)


def _verifier(value: Any) -> str:
    if value not in ("", "ATEN", "TRAINING"):
        raise DamagedError(f"it is in the dialect {shown(value)}, not TRAINING or ATEN")
    return text(value)


_program = record(
    {
        "graph_module": record(
            {
                "graph": _graph,
                "signature": record({"input_specs": array(_input_spec), "output_specs": array(_output_spec)}),
                "module_call_graph": array(record({"fqn": path}, {"signature": nullable(_call_signature)})),
            },
            {
                "metadata": record({}, {"custom": json_text}),
                "treespec_namedtuple_fields": mapping(path, record({"field_names": array(name)})),
            },
        ),
        "opset_version": mapping(name, integer),
        "range_constraints": mapping(expression, record({"min_val": nullable(integer), "max_val": nullable(integer)})),
        "schema_version": record({"major": integer, "minor": integer}),
    },
    {"verifiers": array(_verifier), "torch_version": text},
)
_payload = record(
    {
        "path_name": text,
        "is_param": boolean,
        "use_pickle": boolean,
        "tensor_meta": _tensor_meta(union({"as_int": integer})),
    }
)
