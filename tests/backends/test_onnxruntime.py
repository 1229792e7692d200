"""The ONNX Runtime backend: integer kernels reached, losses reported, session options, scripts, refusals."""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from graphopt import capture
from graphopt.backends.onnx_execution import saturating_products, session
from graphopt.backends.onnx_execution.saturating_products import products_saturate
from graphopt.backends.onnx_execution.session import SessionSettings
from graphopt.backends.onnx_lowering import simplification
from graphopt.backends.onnx_lowering.lowering import Style, lower
from graphopt.backends.onnx_lowering.saving import save
from graphopt.backends.onnxruntime import OnnxRuntimeBackend, breakers
from graphopt.backends.onnxruntime.fusion import kernel_counts
from graphopt.errors import LoweringError, UsageError
from graphopt.ir.program import Program
from graphopt.measure.processor import X86, said_of_processor
from graphopt.targets.backend import Artifact
from tests.backends.quantized import Conv, Dense, IntegerFeedForward, IntegerResNet, Rounded, signed
from tests.models import Residual

BACKEND = OnnxRuntimeBackend()


def program_of(model: nn.Module, *shape: int) -> Program:
    torch.manual_seed(0)
    return capture(model.eval(), torch.randn(shape))


def test_an_onnx_runtime_outside_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.14.1")
    with pytest.raises(UsageError, match=r"onnxruntime from 1\.\d+ to before 1\.\d+, and 1\.14\.1 is installed: run"):
        runpy.run_path(session.__file__)


def test_onnx_runtime_reports_to_nobody(tmp_path: Path) -> None:
    """Its telemetry leaves a file `.ses` with the number of the session where temporary files go."""
    (tmp_path / "temporary").mkdir()
    text = '<ir_version: 10, opset_import: ["": 20]> copy (float[1] x) => (float[1] y) { y = Identity(x) }'
    ir.save(ir.from_onnx_text(text), tmp_path / "model.onnx")
    code = (
        "import graphopt.backends.onnx_execution, onnxruntime\n"
        "onnxruntime.InferenceSession('model.onnx', providers=['CPUExecutionProvider'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    places = {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path / "temporary")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**environment, **places}, check=True)
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Artifact]:
    torch.manual_seed(0)
    program = program_of(IntegerResNet(), 2, 3, 16, 16)
    return program, BACKEND.lower(program, tmp_path_factory.mktemp("resnet") / "onnxruntime.onnx")


@pytest.fixture(scope="module")
def feed_forward(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Artifact]:
    torch.manual_seed(0)
    program = program_of(IntegerFeedForward(), 2, 5, 32)
    return program, BACKEND.lower(program, tmp_path_factory.mktemp("ffn") / "onnxruntime.onnx")


def test_every_quantized_operator_reaches_an_integer_kernel(resnet: tuple[Program, Artifact]) -> None:
    _, artifact = resnet
    counts = kernel_counts(artifact.path, SessionSettings.of(artifact.session_options))
    assert (counts["QLinearConv"], counts["QLinearAdd"], counts["QLinearGlobalAveragePool"]) == (6, 2, 1)
    assert counts["QGemm"] == 1
    assert "Conv" not in counts
    assert (artifact.facts["quantized"], artifact.facts["integer"]) == (10, 10)
    assert BACKEND.check(artifact) == []
    assert BACKEND.summary(artifact) == "10 of 10 quantized operators on integer kernels"


def test_integer_artifact_is_verified(resnet: tuple[Program, Artifact]) -> None:
    program, artifact = resnet
    assert BACKEND.verify(artifact, program) < 0.1


def test_products_are_precise_on_processors_that_saturate(resnet: tuple[Program, Artifact], tmp_path: Path) -> None:
    artifact = resnet[1]
    assert artifact.session_options["where_products_saturate"] == {"session.x64quantprecision": "1"}
    plain = BACKEND.lower(capture(nn.Linear(4, 4), torch.randn(2, 4)), tmp_path / "float.onnx")
    assert "where_products_saturate" not in plain.session_options


@pytest.mark.parametrize("saturates", [True, False])
def test_sessions_are_precise_where_products_saturate(
    resnet: tuple[Program, Artifact], monkeypatch: pytest.MonkeyPatch, *, saturates: bool
) -> None:
    """Precise ones take three times as long on processors that have no need of them."""
    monkeypatch.setattr(session, "products_saturate", lambda: saturates)
    native = SessionSettings.of(resnet[1].session_options).native()
    assert precise(native) is saturates

    script = BACKEND.run_script(resnet[1])
    start, end = script.index("product ="), script.index("session = ")
    found = np.full((saturating_products.SIZE, saturating_products.SIZE), saturating_products.EXACT - saturates)
    given = onnxruntime.SessionOptions()
    fake = SimpleNamespace(InferenceSession=lambda *_, **__: SimpleNamespace(run=lambda *_: [found]))
    exec(script[start:end], {"onnxruntime": fake, "np": np, "options": given})
    assert precise(given) is saturates


def precise(options: onnxruntime.SessionOptions) -> bool:
    try:
        return bool(options.get_session_config_entry("session.x64quantprecision") == "1")
    except RuntimeError:  # it has no such entry
        return False


@pytest.mark.skipif(
    platform.machine() not in X86 or not said_of_processor("flags"), reason="which processor has VNNI is known of x86"
)
def test_products_saturate_on_x86_without_vnni() -> None:
    flags = " ".join(said_of_processor("flags")).split()
    assert products_saturate() == (not {"avx512_vnni", "avx_vnni"} & {*flags})


@pytest.mark.parametrize("saturates", [True, False])
def test_one_product_that_is_off_saturates(monkeypatch: pytest.MonkeyPatch, *, saturates: bool) -> None:
    found = np.full((saturating_products.SIZE, saturating_products.SIZE), saturating_products.EXACT)
    found[-1, -1] -= saturates
    fake = SimpleNamespace(InferenceSession=lambda *_, **__: SimpleNamespace(run=lambda *_: [found]))
    monkeypatch.setattr(saturating_products, "onnxruntime", fake)
    assert products_saturate.__wrapped__() is saturates


def test_products_that_saturate_are_found() -> None:
    """What they would be in 16 bits, of which the runtime adds up pairs, is not what they are."""
    probe = ReferenceEvaluator(onnx.load_from_string(saturating_products.probe()))
    feed = {"a": np.full((32, 32), 255, np.uint8), "b": np.full((32, 32), 127, np.int8)}
    assert (probe.run(None, feed)[0] == saturating_products.EXACT).all()
    assert saturating_products.EXACT > 32 // 2 * (2**15 - 1)


def test_weights_are_a_quarter(resnet: tuple[Program, Artifact]) -> None:
    model = ir.load(resnet[1].path)
    weights = [value for value in model.graph.initializers.values() if len(value.shape) in (2, 4)]
    assert {value.dtype for value in weights} == {ir.DataType.INT8}


def test_products_of_a_transformer_give_float(feed_forward: tuple[Program, Artifact]) -> None:
    program, artifact = feed_forward
    counts = kernel_counts(artifact.path, SessionSettings.of(artifact.session_options))
    assert counts["MatMulIntegerToFloat"] == 2
    assert artifact.session_options["disabled_optimizers"] == ["BiasGeluFusion", "SkipLayerNormFusion"]
    assert BACKEND.verify(artifact, program) < 1e-4


def test_a_fusion_that_would_lose_the_integers_is_turned_off(tmp_path: Path) -> None:
    """A product of fixed shape with a bias behind it becomes a float Gemm, unless told otherwise."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.product, self.bias = Rounded(0.03, 128), Dense(16, 8), nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.input(x) @ self.product.stored().t() + self.bias

    program = program_of(Product(), 2, 16)
    artifact = BACKEND.lower(program, tmp_path / "product.onnx")
    assert artifact.session_options["disabled_optimizers"] == ["MatMulAddFusion"]
    assert [layer.kernel for layer in BACKEND.integer_operators(artifact)] == ["MatMulIntegerToFloat"]
    BACKEND.verify(artifact, program)
    lost = BACKEND.check(Artifact(artifact.path, artifact.files, BACKEND, artifact.inputs, artifact.outputs))
    assert [finding.text for finding in lost] == [
        "MatMul is quantized, but ONNX Runtime runs it in float: MatMulAddFusion made a float Gemm of it and its bias."
    ]


def test_a_weight_left_float_between_integers_stays_float(tmp_path: Path) -> None:
    class Upsampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.middle, self.output = Rounded(0.03, 128), Rounded(0.05, 128), Rounded(0.03, 128)
            self.conv, self.up = Conv(3, 3), nn.ConvTranspose2d(3, 4, 2, 2)
            self.up.weight.data[0, 0, 0, 0] = 100.0  # one scale for the whole weight would leave nothing of the rest

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.up(self.middle(self.conv(self.input(x)))))

    program = program_of(Upsampling(), 2, 3, 4, 4)
    artifact = BACKEND.lower(program, tmp_path / "up.onnx")
    x = torch.randn(2, 3, 4, 4)
    (found,) = artifact.session(disabled_optimizers=[])(x.numpy())
    steps = (torch.from_numpy(found) - program(x)).abs() / 0.03
    assert steps.max() < 1.01
    assert [layer.kernel for layer in BACKEND.integer_operators(artifact)] == ["QLinearConv"]


class Routing(nn.Module):
    """Its logits lie close together: ONNX Runtime 1.31.1 has an integer softmax, which is wrong for those."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.logits, self.shares = Rounded(0.03, 128), Rounded(0.001, 128), Rounded(0.09 / 255)
        self.conv, self.softmax, self.mix, self.output = Conv(3, 16), nn.Softmax(1), Conv(16, 3, 1), Rounded(0.01, 128)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.shares(self.softmax(self.logits(self.conv(self.input(x) * 0.02))).transpose(2, 3))
        return self.output(self.mix(shares))


def test_a_softmax_between_integers_stays_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(Routing(), 2, 3, 8, 8)
    artifact = BACKEND.lower(program, tmp_path / "routing.onnx")
    BACKEND.verify(artifact, program)
    assert "Softmax" in kernel_counts(artifact.path, SessionSettings())  # with no options of ours either
    monkeypatch.setattr(breakers, "BREAKERS", {})
    fused = BACKEND.lower(program, tmp_path / "fused.onnx")
    said = r"than the program for the result of `transpose`: off by \d\d+.*\(int8:skip=transpose\+mix\)"
    with pytest.raises(LoweringError, match=said):
        BACKEND.verify(fused, program)


def test_a_pool_that_reaches_beyond_its_padding_is_right(tmp_path: Path) -> None:
    """ONNX Runtime's integer kernel counts what is behind the padding; without padding none has to count."""

    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.roundings = nn.ModuleList(Rounded(scale, 128) for scale in (0.03, 0.02, 0.02))
            self.pools = nn.ModuleList((nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 2, 1, ceil_mode=True)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.roundings[0](x)
            for pool, rounding in zip(self.pools, self.roundings[1:], strict=True):
                x = rounding(pool(x))
            return x

    program = program_of(Pools(), 2, 3, 11, 11)
    artifact = BACKEND.lower(program, tmp_path / "pools.onnx")
    BACKEND.verify(artifact, program)
    counts = kernel_counts(artifact.path, SessionSettings.of(artifact.session_options))
    assert (counts["QLinearAveragePool"], counts["AveragePool"]) == (1, 1)


class ReluBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input, self.conv, self.output = Rounded(0.03, 128), Conv(3, 8), Rounded(0.02, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.conv(self.input(x)).relu())


class FloatResult(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input, self.conv = Rounded(0.03, 128), Conv(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.input(x))


class FloatBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input, self.dense = Rounded(0.03, 128), Dense(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.input(x))


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input, self.conv, self.output = Rounded(0.03, 128), Conv(3, 8), Rounded(0.02, 128)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        result = self.conv(self.input(x))
        return result, self.output(result)


class SignedFanOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input, self.middle, self.output = signed(0.03), signed(0.02), signed(0.02)
        self.first, self.second = Conv(3, 8), Conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(self.input(x)))
        return self.output(self.second(x)) + x


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (
            ReluBetween,
            (2, 3, 8, 8),
            "Relu stands in front of the quantization of its result, whose zero point is not 0",
        ),
        (FloatResult, (2, 3, 8, 8), "its result is not quantized, and the convolution kernel only writes integers"),
        (FloatBias, (2, 16), "its bias is float; QGemm takes an int32 one"),
        (ReadTwice, (2, 3, 8, 8), "its result is read both quantized and in float"),
        (SignedFanOut, (2, 3, 8, 8), "its activations are int8; a value with several readers then stays float"),
    ],
)
def test_lost_integers_are_reported_with_the_reason(
    model: type[nn.Module], shape: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    program = program_of(model(), *shape)
    artifact = BACKEND.lower(program, tmp_path / "lost.onnx")
    findings = BACKEND.check(artifact)
    assert [finding.severity for finding in findings] == ["warning"] * len(findings)
    assert any(reason in finding.text for finding in findings)
    BACKEND.verify(artifact, program)


class TestSession:
    def test_takes_arrays_in_order_and_gives_arrays(self, resnet: tuple[Program, Artifact]) -> None:
        session = resnet[1].session(threads=1)
        (found,) = session(np.zeros((5, 3, 16, 16), np.float32))
        assert found.shape == (5, 10)
        assert found.dtype == np.float32

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"thread": 1}, "There is no session option `thread`. Known: threads"),
            ({"\ud800": 1}, r"There is no session option `\\ud800`. Known: threads"),
            ({"threads": -1}, "Session option `threads` cannot be -1: "),
            ({"threads": 10**6}, "Session option `threads` cannot be 1000000: .* less than or equal to 1024"),
            ({"threads": 10**30}, "Session option `threads` cannot be 1000"),
            ({"threads": True}, "Session option `threads` cannot be True: "),
            ({"threads": "2"}, "Session option `threads` cannot be '2': "),
            ({"threads": None}, "Session option `threads` cannot be None: "),
            ({"optimization": "most"}, "Session option `optimization` cannot be 'most': "),
            ({"optimization": ["all"]}, "Session option `optimization` cannot be .'all'.: "),
            ({"spinning": 1}, "Session option `spinning` cannot be 1: "),
            ({"disabled_optimizers": [3]}, "Session option `disabled_optimizers` cannot be .3.: "),
            ({"disabled_optimizers": "abc"}, "Session option `disabled_optimizers` cannot be 'abc': "),
            ({"disabled_optimizers": ["a'b"]}, "Session option `disabled_optimizers` cannot be "),
            ({"config": [1]}, "Session option `config` cannot be .1.: "),
            ({"config": {"session.x64quantprecision": 1}}, "Session option `config` cannot be "),
            ({"config": {"session.x64quantprecision": "1\0"}}, "Session option `config` cannot be "),
            (
                {"config": {"session.model_external_initializers_file_folder_path": "x"}},
                "Session option `config` cannot be ",
            ),
        ],
    )
    def test_unknown_options(self, resnet: tuple[Program, Artifact], options: dict[str, object], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            resnet[1].session(**options)  # type: ignore[arg-type]

    def test_inputs_that_do_not_fit(self, resnet: tuple[Program, Artifact]) -> None:
        session = resnet[1].session()
        with pytest.raises(LoweringError, match=r"takes 1 inputs \(x\), given were 2 in order"):
            session(np.zeros(1), np.zeros(1))
        with pytest.raises(LoweringError, match=r"takes 1 inputs \(x\), given were 0 in order and y by name"):
            session(y=np.zeros(1))
        with pytest.raises(LoweringError, match=r"given were 1 in order and x by name"):
            session(np.zeros(1), x=np.zeros(1))
        shape = r"fails on inputs x: 1x2x16x16: Got invalid dimensions for input: x .* index: 1 Got: 2 Expected: 3$"
        with pytest.raises(LoweringError, match=shape):
            session(np.zeros((1, 2, 16, 16), np.float32))

    def test_recorded_options_reach_the_runtime(self) -> None:
        settings = SessionSettings.of(
            {"threads": 3, "spinning": False, "optimization": "basic", "disabled_optimizers": ["A"]}
        )
        native = settings.native()
        assert native.intra_op_num_threads == 3
        assert native.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert settings.disabled_optimizers == ("A",)


class TestOpen:
    def test_reads_the_signature_back(self, resnet: tuple[Program, Artifact]) -> None:
        program, artifact = resnet
        opened = BACKEND.open(artifact.path)
        assert (opened.inputs, opened.outputs) == (program.inputs, program.outputs)
        assert opened.session_options == artifact.session_options
        assert opened.files == artifact.files

    def test_external_data_belongs_to_it(self, resnet: tuple[Program, Artifact], tmp_path: Path) -> None:
        save(ir.load(resnet[1].path), tmp_path / "large.onnx", external_data_above=0)
        opened = BACKEND.open(tmp_path / "large.onnx")
        assert [file.name for file in opened.files] == ["large.onnx", "large.onnx.data"]
        assert opened.size > 4000

    @pytest.mark.parametrize("content", [b"", b"this is no model", b"\x08\x0a"])
    def test_something_else(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(LoweringError, match="ONNX"):
            BACKEND.open(tmp_path / "model.onnx").session()

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(LoweringError, match="There is no file"):
            BACKEND.open(tmp_path / "model.onnx")


def test_run_script_needs_no_graphopt(feed_forward: tuple[Program, Artifact], tmp_path: Path) -> None:
    _, artifact = feed_forward
    script = BACKEND.run_script(artifact)
    assert "graphopt" not in script
    (artifact.path.parent / "run.py").write_text(script)
    x = np.random.default_rng(0).standard_normal((3, 5, 32), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-I", str(artifact.path.parent / "run.py"), f"x={tmp_path / 'x.npy'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("output (3, 5, 32) float32\n")
    (wanted,) = artifact.session()(x)
    assert str(wanted).splitlines()[0] in done.stdout


def test_an_operator_without_a_kernel_leaves_nothing_behind(tmp_path: Path) -> None:
    class Unsupported(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.conv2d(x, torch.ones(2, 3, 1, 1, dtype=torch.float64))

    program = capture(Unsupported(), torch.randn(2, 3, 4, 4, dtype=torch.float64))
    with pytest.raises(LoweringError, match=r"ONNX Runtime refuses model\.onnx: .*Conv"):
        BACKEND.lower(program, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


class TestSimplification:
    @pytest.fixture(scope="class")
    def lowered(self) -> tuple[Program, ir.Model]:
        program = program_of(Residual(), 2, 3, 8, 8)
        return program, lower(program, Style(20, global_pooling=True))

    def test_by_onnxsim_itself(self, lowered: tuple[Program, ir.Model], tmp_path: Path) -> None:
        pytest.importorskip("onnxsim")
        artifact = OnnxRuntimeBackend(simplify=True).lower(lowered[0], tmp_path / "model.onnx")
        assert str(artifact.facts["onnxsim"]).startswith(("discarded: ", "kept: "))
        BACKEND.verify(artifact, lowered[0])

    @pytest.mark.parametrize(
        ("change", "verdict"),
        [
            (lambda proto: proto, "discarded: 9 nodes before, 9 after"),
            (lambda proto: _without_pool(proto, scale=1.0), "kept: 9 nodes before, 8 after"),
            (lambda proto: _without_pool(proto, scale=2.0), "discarded: it computes something else"),
            (lambda proto: 1 / 0, "discarded: it failed (ZeroDivisionError)"),
        ],
    )
    def test_kept_only_if_smaller_and_equal(
        self,
        lowered: tuple[Program, ir.Model],
        change: Callable[[object], object],
        verdict: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        class Fake:
            @staticmethod
            def simplify(proto: object, **_: object) -> tuple[object, bool]:
                return change(proto), True

        monkeypatch.setattr(simplification, "_import", lambda: Fake)
        program, model = lowered
        result, said = simplification.simplify_where_smaller(model, program)
        assert said.startswith(verdict)
        assert (result is model) == said.startswith("discarded")

    def test_not_installed(self, lowered: tuple[Program, ir.Model], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxsim", None)
        with pytest.raises(LoweringError, match=r"pip install 'graphopt\[onnxsim\]'"):
            simplification.simplify_where_smaller(lowered[1], lowered[0])


def _without_pool(proto: object, *, scale: float) -> object:
    """Merge the pool and the squeeze behind it, which is right; scale the head's bias, which is right by 1 only."""
    import onnx

    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    counts = Counter(node.op_type for node in changed.graph.node)
    assert counts["GlobalAveragePool"] == counts["Squeeze"] == 1
    pool = next(node for node in changed.graph.node if node.op_type == "GlobalAveragePool")
    squeeze = next(node for node in changed.graph.node if node.op_type == "Squeeze")
    squeeze.op_type = "ReduceMean"
    squeeze.input[0] = pool.input[0]
    squeeze.attribute.append(onnx.AttributeProto(name="keepdims", type=onnx.AttributeProto.INT, i=0))
    changed.graph.node.remove(pool)
    bias = next(tensor for tensor in changed.graph.initializer if tensor.name == "head.bias")
    bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) * np.float32(scale)).tobytes()
    return changed


def test_bfloat16_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.fc(x.bfloat16()).float()
            return y

    with pytest.raises(LoweringError, match=r"no bfloat16 kernels.*model.float\(\)"):
        OnnxRuntimeBackend().lower(capture(Inside(), torch.randn(2, 4)), tmp_path / "inside.onnx")
    assert not list(tmp_path.iterdir())


def test_bfloat16_under_autocast_is_refused_with_the_way_out(tmp_path: Path) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y: torch.Tensor = self.fc(x)
            return y.float()

    with pytest.raises(LoweringError, match=r"no bfloat16 kernels.*leave out torch\.autocast"):
        OnnxRuntimeBackend().lower(capture(Cast(), torch.randn(2, 4)), tmp_path / "cast.onnx")


def test_constants_of_the_exporters_own_functions(tmp_path: Path) -> None:
    class Bag(nn.Module):
        """One bag of all words, which is of no fixed size."""

        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(50, 16)
            self.register_buffer("start", torch.tensor([0]))

        def forward(self, words: Tensor) -> Tensor:
            bag: Tensor = self.bag(words, self.start)
            return bag

    program = capture(Bag(), torch.randint(0, 50, (8,)))
    artifact = BACKEND.lower(program, tmp_path / "bag.onnx")
    assert BACKEND.verify(artifact, program) < 1e-5


def test_a_branch_may_return_what_it_was_given(tmp_path: Path) -> None:
    class Maybe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.cond(x.sum() > 0, lambda x: x.clone(), self.fc, (x,))
            return y + 1

    program = program_of(Maybe(), 2, 4)
    artifact = BACKEND.lower(program, tmp_path / "maybe.onnx")
    assert BACKEND.verify(artifact, program, (np.ones((8, 4), np.float32),)) < 1e-5
    assert BACKEND.verify(artifact, program, (-np.ones((8, 4), np.float32),)) < 1e-5
