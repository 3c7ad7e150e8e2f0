"""A graph in float32 and inputs that it meets -> a graph with 8-bit layers, all but those that 8 bits harm most.

Channels are evened out first (`smooth.py`). NNCF chooses ranges and corrects biases; the graph says so in ONNX's own
operators, QuantizeLinear and DequantizeLinear. Which layers stay as they are is measured here: every group of layers
is switched to 8 bits alone, and the groups that move the noise prediction most for their work go back to float.

Knows graphs and numbers; knows nothing about models or steps.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import re
import sys
import tempfile
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from torch import Tensor

from fastcache.bundle.manifest import KeptLayers, QuantizedEngine
from fastcache.compile.smooth import smooth
from fastcache.errors import BackendUnavailable, BuildError
from fastcache.expect import first_line
from fastcache_engines.extras import install
from fastcache_engines.onnx_files import refuse_outside_weights

Kind = Literal["conv", "linear", "attention"]

AIM_DB: Final = 45.0  # of what rounding activations adds to the noise prediction, as a signal-to-noise ratio
MOST_KEPT: Final = 0.25  # of a pass's multiply-adds, in layers that stay in float
_TRIED: Final = 8  # calls on which each group of layers is tried; on three the choice cost the bundled model 5 dB
_TRIED_LARGE: Final = 3  # of a graph of 256 MiB or more: a call takes seconds, and there are some ninety groups
_LARGE_BYTES: Final = 256 << 20
_MOVES: Final = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")  # what they give is what they take
_LAYERS: Final[Mapping[str, Kind]] = {"Conv": "conv", "Gemm": "linear", "MatMul": "linear"}

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Group:
    """Layers of one kind at one place of the network: by the names of their nodes, and their multiply-adds."""

    place: str
    kind: Kind
    nodes: tuple[str, ...]
    work: int


def require_nncf() -> None:
    """Raise `BackendUnavailable` where NNCF is not installed."""
    if importlib.util.find_spec("nncf") is None:
        raise BackendUnavailable(f"NNCF, which chooses 8-bit ranges, is not installed; run: {install('int8')}")


def quantize(path: Path, calls: Sequence[Mapping[str, Tensor]], weight_bits: int) -> tuple[ir.Model, QuantizedEngine]:
    """The 8-bit graph of one in float32, whose weights lie beside it, and what the manifest says of it.

    Raises: `BackendUnavailable` without NNCF; `BuildError` with its reason.
    """
    require_nncf()
    inputs = [{name: value.numpy() for name, value in call.items()} for call in calls]
    is_large = sum(file.stat().st_size for file in refuse_outside_weights(path)) >= _LARGE_BYTES
    most = min(_TRIED_LARGE if is_large else _TRIED, len(inputs))
    tried = [inputs[k] for k in np.linspace(0, len(inputs) - 1, most, dtype=int)]
    wanted = _outputs(path, tried)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        even = smooth(path, inputs, Path(folder))
        groups, errors = _sensitivities(_quantized(even, inputs, weight_bits), tried, wanted)
        kept = _worst(groups, errors)
        made = _quantized(even, inputs, weight_bits, [node for group in kept for node in group.nodes])
    run = _session(made)
    error = _error(wanted, [run(one) for one in tried])
    entry = QuantizedEngine(
        layers=sum(len(group.nodes) for group in groups if group not in kept),
        kept=tuple(KeptLayers(place=g.place, kind=g.kind, layers=len(g.nodes), snr_db=_db(errors[g])) for g in kept),
        snr_db=_db(error),
        calls=len(inputs),
    )
    return made, entry


def _worst(groups: Sequence[Group], errors: Mapping[Group, float]) -> list[Group]:
    """The groups that stay in float: those of most error for their work, until the others' errors add up to little.

    Errors of groups that are switched alone add up: on the bundled model they sum to 33.5 dB where all together make
    33.6.
    """
    total, aim = sum(group.work for group in groups), 10 ** (-AIM_DB / 10)
    rest, kept, work = sum(errors.values()), list[Group](), 0
    for group in sorted(groups, key=lambda one: errors[one] / (one.work + total / 1000 + 1), reverse=True):
        if rest <= aim:
            break
        if errors[group] > aim / 10 and work + group.work <= MOST_KEPT * total:
            kept.append(group)
            rest, work = rest - errors[group], work + group.work
    return kept


def _quantized(path: Path, inputs: Sequence[Arrays], weight_bits: int, kept: Collection[str] = ()) -> ir.Model:
    """What NNCF makes of a graph, with the nodes in `kept` left in float."""
    with _nncf() as nncf:
        from nncf.onnx.quantization.backend_parameters import BackendParameters
        from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters, OverflowFix
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        # Without VNNI x86 adds two products of 8 bits in 16, which overflow: there weights have 7 bits.
        narrow = OverflowFix.ENABLE if weight_bits == 7 else OverflowFix.DISABLE
        parameters = nncf.AdvancedQuantizationParameters(
            overflow_fix=narrow,
            # NNCF's own choice, the mean of the calls' extremes, cuts off what the first steps and the last ones need.
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
            backend_params={BackendParameters.EXTERNAL_DATA_DIR: str(path.parent.resolve())},
        )
        try:
            model = nncf.quantize(
                onnx.load(str(path), load_external_data=False),
                nncf.Dataset(list(inputs)),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(inputs),
                ignored_scope=nncf.IgnoredScope(names=list(kept)) if kept else None,
                advanced_parameters=parameters,
            )
        except Exception as error:  # NNCF's, ONNX Runtime's and protobuf's errors share no base class
            raise BuildError(f"cannot quantise {path.name}: {first_line(error)}") from error
    made = ir.serde.deserialize_model(model)
    ir.external_data.set_base_dir(made.graph, path.parent)
    round_next_to_layers(made.graph)
    return ir.external_data.load_to_model(made)


def round_next_to_layers(graph: ir.Graph) -> None:
    """Put a rounding that has a reshape or transpose behind it right before the layer that the two are for.

    The graph computes the same. Between the two OpenVINO 2026.4.1 rounds numbers to whole ones where the processor has
    no AVX512, and says nothing: the tiny test model was 48% off, and is 0.0001% off like this. It is also where this
    module looks for the rounding of a layer's input.
    """
    waiting = [node for node in graph if _before_rounding(node.outputs[0]) is not None]
    while waiting:
        widen = waiting.pop()
        rounded, before = widen.inputs[0], _before_rounding(widen.outputs[0])
        if rounded is None or before is None or (narrow := rounded.producer()) is None or not _is_single(narrow):
            continue
        for mover in [use.node for use in widen.outputs[0].uses() if use.idx == 0 and use.node.op_type in _MOVES]:
            moved = mover.outputs[0]
            if moved.is_graph_output():
                continue
            after = [(use.node, use.idx) for use in moved.uses()]
            mover.replace_input_with(0, before)
            again = ir.node("QuantizeLinear", [moved, *narrow.inputs[1:]], attributes=dict(narrow.attributes))
            wide = ir.node("DequantizeLinear", [again.outputs[0], *widen.inputs[1:]], attributes=dict(widen.attributes))
            graph.insert_after(mover, [again, wide])
            for node, place in after:
                node.replace_input_with(place, wide.outputs[0])
            waiting.append(wide)
        if not widen.outputs[0].uses() and not widen.outputs[0].is_graph_output():
            graph.remove([widen, narrow] if len(rounded.uses()) == 1 else [widen], safe=True)


def _is_single(narrow: ir.Node) -> bool:
    """Whether a rounding has one scale for all of its tensor, which a reshape leaves valid."""
    scale = narrow.inputs[1]
    return scale is not None and scale.shape is not None and math.prod(scale.shape.numpy()) == 1


@contextlib.contextmanager
def _nncf() -> Generator[Any]:
    """NNCF, which tells nobody of being used, and keeps its logs and progress bars to itself."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)  # it takes this for not installed
    import nncf

    level = logging.getLogger("nncf").level
    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        yield nncf
    finally:
        logging.getLogger("nncf").setLevel(level)


def _sensitivities(
    model: ir.Model, tried: Sequence[Arrays], wanted: Sequence[npt.NDArray[Any]]
) -> tuple[list[Group], dict[Group, float]]:
    """The groups of a quantised graph's layers, and what rounding the activations of each alone adds to the error.

    The graph gets one more input, which says group by group whether it is given rounded activations or those before
    rounding; so one session answers for all. The model is changed by this.
    """
    groups = _groups(model.graph)
    switches = ir.Value(name="rounded", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([len(groups)]))
    first = next(iter(model.graph))
    model.graph.inputs.append(switches)
    nodes = {node.name: node for node in model.graph}
    for k, group in enumerate(groups):
        index = ir.node("Constant", [], attributes={"value": ir.tensor(np.array(k))})
        switch = ir.node("Gather", [switches, index.outputs[0]])
        model.graph.insert_before(first, [index, switch])
        for node in (nodes[name] for name in group.nodes):
            for place, value in enumerate(node.inputs[:2]):
                before = _before_rounding(value)
                if before is not None:
                    choice = ir.node("Where", [switch.outputs[0], value, before])
                    model.graph.insert_before(node, [choice])
                    node.replace_input_with(place, choice.outputs[0])
    run = _session(model)

    def error(on: npt.NDArray[np.bool_]) -> float:
        return _error(wanted, [run({**one, "rounded": on}) for one in tried])

    off = np.zeros(len(groups), bool)
    base = error(off)
    alone = [error(np.arange(len(groups)) == k) - base for k in range(len(groups))]
    return groups, {group: max(one, 0.0) for group, one in zip(groups, alone, strict=True)}


def _groups(graph: ir.Graph) -> list[Group]:
    """The quantised layers of a graph, by place and kind."""
    found, place = dict[tuple[str, Kind], list[ir.Node]](), "input"
    for node in graph:
        if node.op_type not in _LAYERS or not any(_before_rounding(value) for value in node.inputs[:2]):
            continue
        module = _module(node)
        place = re.split(r"\.(?:resnet|attention|conv|time)", module)[0] if module else place
        products = node.op_type == "MatMul" and all(_before_rounding(value) for value in node.inputs[:2])
        found.setdefault((place, "attention" if products else _LAYERS[node.op_type]), []).append(node)
    return [
        Group(place, kind, tuple(str(node.name) for node in nodes), sum(map(_work, nodes)))
        for (place, kind), nodes in found.items()
    ]


def _module(node: ir.Node) -> str | None:
    """The module that a layer is, as its parameters, or those added to what it gives, are named."""
    adders = [use.node for use in node.outputs[0].uses() if use.node.op_type == "Add"]
    names = [value.name or "" for one in (node, *adders) for value in one.inputs if value is not None]
    found = next((name for name in names if name.startswith("unet.")), None)
    return found and re.sub(r"\.(?:weight|bias)(?:_\w+)?$", "", found.removeprefix("unet."))


def _before_rounding(value: ir.Value | None) -> ir.Value | None:
    """What a tensor was before QuantizeLinear and DequantizeLinear rounded it; None for one that they did not."""
    widened = value.producer() if value is not None else None
    if widened is None or widened.op_type != "DequantizeLinear" or widened.inputs[0] is None:
        return None
    rounded = widened.inputs[0].producer()
    return rounded.inputs[0] if rounded is not None and rounded.op_type == "QuantizeLinear" else None


def _work(node: ir.Node) -> int:
    """A layer's multiply-adds for one row; 0 where sizes are free."""
    given, taken = (value.shape if value is not None else None for value in (node.outputs[0], node.inputs[1]))
    if given is None or taken is None:
        return 0
    outputs = [size for size in given if isinstance(size, int)]  # all but the batch
    weight = [size for size in taken if isinstance(size, int)]
    each = math.prod(weight[1:]) if node.op_type == "Conv" else (weight[-2] if len(weight) > 1 else 1)
    return math.prod(outputs) * each


def _session(model: ir.Model) -> Any:
    """A graph that is rounded as it says and otherwise computed in float32: inputs -> the noise prediction."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    settings.log_severity_level = 3
    content = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["noise_pred"], inputs)[0]


def _outputs(path: Path, tried: Sequence[Arrays]) -> list[npt.NDArray[Any]]:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [session.run(["noise_pred"], one)[0] for one in tried]


def _error(wanted: Sequence[npt.NDArray[Any]], got: Sequence[npt.NDArray[Any]]) -> float:
    """The squares of what is wrong, by those of what is right."""
    wrong = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in zip(wanted, got, strict=True))
    return wrong / sum(float(np.square(a, dtype=np.float64).sum()) for a in wanted)


def _db(error: float) -> float:
    """A ratio of squares as a signal-to-noise ratio, in dB."""
    return round(-10 * math.log10(max(error, 1e-12)), 1)
