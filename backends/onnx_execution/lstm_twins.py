"""What LSTMs on integers compute, as further outputs of a model: those of a twin beside each.

The optimizer moves a quantization past what only moves values, up to who computes them: what is returned of the LSTM
itself would be rounded (QDQPropagationTransformer, 1.31.1). A clip that clips nothing keeps the optimizer from seeing
that the two are one, and a twin has weights of its own: on x86 without VNNI the runtime rewrites them, once.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

_OWN = (1, 2, 9, 11)  # inputs: the weights and their zero points
_NO_CLIP = 1e30


def add_twins(model: onnx.ModelProto, values: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Add the twins.

    Args:
        model: what is changed.
        values: names of what nodes compute, by program node.

    Returns:
        Names of what the twins compute, by program node.
    """
    sources = {names[0]: source for source, names in values.items()}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for index, node in reversed(list(enumerate(model.graph.node))):
        if node.op_type != "DynamicQuantizeLSTM" or node.output[0] not in sources:
            continue
        twin = onnx.NodeProto.FromString(node.SerializeToString())
        twin.name = f"{node.name}_twin"
        twin.output[:] = [f"{name}_twin" for name in node.output]
        twin.attribute.append(onnx.helper.make_attribute("clip", _NO_CLIP))
        for position in _OWN:
            name = node.input[position]
            while name not in stored:  # weights that several read are reshaped to what they are, see `own_weights`
                name = producers[name].input[0]
            own = onnx.TensorProto.FromString(stored[name].SerializeToString())
            own.name = twin.input[position] = f"{twin.name}_{position}"
            model.graph.initializer.append(own)
        model.graph.node.insert(index + 1, twin)
        found[sources[node.output[0]]] = list(twin.output)
    return found
