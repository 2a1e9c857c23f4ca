"""Plans for machines that are not at hand: the model of time by hand, the table of devices, pages, and the command.

What needs JAX's CUDA plugin or libtpu is skipped where they are not installed (`pip install '.[plan]'`, and `'.[rocm]'`
for AMD's).
"""

import ctypes
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
import tiny_bundles

from cascade_jax import acceptance, cli, methods, trees
from cascade_jax import bundle as bundles
from cascade_jax.drafters.jacobi import Jacobi
from cascade_jax.measure import devices, rocm, shapes
from cascade_jax.measure import plan as planning
from cascade_jax.measure.devices import DEVICES, DeviceError, Roofline, describe
from cascade_jax.measure.hlo import Frame
from cascade_jax.measure.kernels import Kernel
from cascade_jax.measure.plan import Case, Plan, ProgramPlan, model, report

ROOT = pathlib.Path(__file__).parents[1]
EASY = Roofline(bandwidth=1e9, matmul=1e12, launch=1e-6, link=1e8, exchange=1e-5)
FRAMES = Frame("models/a.py", 7, "inner"), Frame("models/a.py", 3, "middle"), Frame("models/b.py", 5, "outer")


def kernel(**given) -> Kernel:
    usual = {
        "name": "k.1",
        "operation": "fusion",
        "times": 1,
        "bytes": 0,
        "flops": 0,
        "phase": "target",
        "shape": "f32[1]",
    }
    return Kernel(**(usual | given))


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


cuda = pytest.mark.skipif(
    not (installed("jax_plugins") and installed("jax_plugins.xla_cuda13")), reason="needs JAX's CUDA plugin"
)
tpu = pytest.mark.skipif(not installed("libtpu"), reason="needs libtpu")
amd = pytest.mark.skipif(
    not (installed("jax_plugins") and installed("jax_plugins.xla_rocm7")), reason="needs JAX's ROCm plugin"
)


def test_a_kernel_takes_its_launch_and_the_longer_of_moving_and_computing():
    moved, computed = kernel(times=3, bytes=2000), kernel(bytes=1000, flops=5_000_000)
    found = model.cost([moved, computed], EASY, beside=False)
    assert (found.kernels, found.bytes, found.flops) == (4, 7000, 5_000_000)
    assert found.launch == pytest.approx(4e-6)
    assert found.work == pytest.approx(3 * 2e-6 + 5e-6)
    assert found.seconds == pytest.approx(15e-6)


def test_where_transfers_run_beside_the_computation_the_longer_of_both_counts():
    transfer, product = kernel(bytes=4000, launched=False), kernel(flops=3_000_000)
    assert model.cost([transfer, product], EASY, beside=True).seconds == pytest.approx(1e-6 + 4e-6)
    assert model.cost([transfer, product], EASY, beside=False).seconds == pytest.approx(1e-6 + 7e-6)


@pytest.mark.parametrize(
    ("kind", "volume"),
    [("all-reduce", 1.5), ("all-gather", 0.75), ("reduce-scatter", 3), ("all-to-all", 0.75), ("collective-permute", 1)],
)
def test_an_exchange_sends_its_bytes_around_a_ring(kind, volume):
    exchange = kernel(collective=kind, group=4, exchanged=1000)
    assert model.exchange_seconds(exchange, EASY) == pytest.approx(1e-5 + volume * 1e-5)
    assert model.exchange_seconds(dataclasses.replace(exchange, group=1), EASY) == 0


def test_phases_add_up_and_exchanges_are_counted_by_kind():
    rows = [kernel(phase="draft", bytes=10), kernel(phase="prefill", bytes=5), kernel(bytes=1, times=2)]
    found = model.by_phase(rows, EASY, beside=False)
    assert {phase: cost.bytes for phase, cost in found.items()} == {"draft": 10, "target": 2, "prefill": 5}
    assert model.total(found.values()).kernels == 4
    pair = [kernel(collective="all-reduce", group=2, exchanged=8, times=3)] * 2
    assert model.collectives([*pair, *rows]) == [model.Collective("all-reduce", 2, 6, 48)]


def test_like_kernels_of_one_line_are_one_row_and_the_dearest_come_first():
    alike = [kernel(name=f"loop_fusion.{i}", bytes=1000, frames=FRAMES) for i in range(4)]
    first, second = model.dearest([kernel(name="other", bytes=2500), *alike], EASY)
    assert (first.count, first.kind, first.seconds) == (4, "loop_fusion", pytest.approx(4 * 2e-6))
    assert first.source == "models/a.py:7 inner, from middle, outer"
    assert (second.kind, second.source) == ("other", "")
    assert len(model.dearest([*alike, kernel(bytes=9)], EASY, most=1)) == 1


def test_large_copies_are_counted_and_products_and_small_ones_are_not():
    large = kernel(name="loop_transpose_fusion.3", bytes=3_000_000, times=2)
    rows = [large, kernel(name="copy.1", bytes=5), kernel(name="pad_dot", bytes=3_000_000, flops=9), kernel(bytes=9**9)]
    assert model.copies(rows) == model.Copies(2, 6_000_000)


def test_every_device_is_described_in_full():
    for name, device in DEVICES.items():
        assert describe(name) == device
        assert all(value > 0 for value in dataclasses.astuple(device.roofline))
        assert device.count >= 1
        assert (device.card is None) == (device.platform == "tpu")
        assert 1e9 < device.memory < 1e12


@pytest.mark.parametrize(
    ("text", "needed", "topology"),
    [("h100", 1, "1"), ("h100", 8, "8"), ("h100:4", 2, "4"), ("v5e", 1, "1x1"), ("v5e", 3, "2x2"), ("v6e", 8, "2x4"),
     ("v5p", 8, "2x2x2"), ("v5e:4x4", 4, "4x4")],
)  # fmt: skip
def test_a_topology_is_taken_that_has_enough_devices(text, needed, topology):
    found = describe(text, needed)
    assert found.topology == topology
    assert found.count >= needed


@pytest.mark.parametrize(
    ("text", "needed", "says"),
    [("h1000", 1, "unknown device 'h1000'; known: h100, h200, a100"), ("v5e:2", 1, "give it as v5e:2x2"),
     ("h100:2x2", 1, "give it as h100:8"), ("h100:", 1, "give it as h100:8"), ("v5e:2x2", 8, "has 4"),
     ("v5e", 1000, "v5e:16x16 has 256")],
)  # fmt: skip
def test_what_cannot_be_described_is_refused_in_a_line(text, needed, says):
    with pytest.raises(DeviceError, match=says):
        describe(text, needed)


@pytest.mark.parametrize(
    ("name", "what", "extra"),
    [("h100", "JAX's CUDA plugin", "plan"), ("v5e", "libtpu", "plan"), ("mi300x", "JAX's ROCm plugin", "rocm")],
)
def test_what_compiles_for_a_device_is_asked_for_by_name(name, what, extra, monkeypatch, capsys):
    monkeypatch.setattr(devices, "_installed", lambda module: False)
    assert cli.main(["plan", "--device", name]) == 2
    assert f"{what}: pip install 'cascade_jax[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--method", "foo"], "unknown method 'foo'"), (["--shapes", "foo"], "unknown shapes 'foo'"),
     (["--programs", "foo"], "unknown program 'foo'"), (["--batch", "0"], "batch must be at least 1"),
     (["--launch", "-1"], "launch is out of range"), (["--alpha", "-1"], "alpha must be at least 0"),
     (["--mesh", "model=x"], "a mesh is given as"), (["--dtype", "int8"], "dtype must be"),
     (["--model", "nowhere"], "there is no model"), (["--batch", "3", "--mesh", "data=2"], "cannot be divided")],
)  # fmt: skip
def test_a_wrong_flag_is_answered_in_one_line(flags, says, capsys):
    assert cli.main(["plan", "--device", "h100", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.fixture
def plan() -> Plan:
    """By hand: AR's step takes 10 us, CASCADE's 20."""

    def program(microseconds: int) -> ProgramPlan:
        kernels = [kernel(times=microseconds, frames=FRAMES)]
        phases = model.by_phase(kernels, EASY, beside=False)
        return ProgramPlan(1.0, 100, 0, 50, 0, phases, [], model.copies(kernels), model.dearest(kernels, EASY))

    cases = [
        Case(name, tree, 1, 90, 150, True, None, {"prefill": program(5), "step": program(99), "loop": program(each)})
        for name, tree, each in (("ar", "root", 10), ("cascade", "eagle25", 20))
    ]
    cases = [planning._with_picture(case, cases, 101, 3.0) for case in cases]
    weights = {"target": 80, "drafter": 10}
    return Plan("some/toy", "bfloat16", DEVICES["h100"], None, EASY, weights, 4, 101, 3.0, {"jax": "1"}, cases)


def test_a_picture_is_a_prefill_and_the_turns_that_its_tokens_take(plan):
    strict, drafted = (case.picture for case in plan.cases)
    assert strict.steps == pytest.approx(100 * 10e-6)
    assert drafted.steps == pytest.approx(100 / 4 * 20e-6)
    assert drafted.speedup == pytest.approx((5 + 1000) / (5 + 500))
    assert strict.speedup == 1


def test_without_an_alpha_only_token_by_token_pictures_are_reckoned(plan):
    strict, drafted = (
        planning._with_picture(dataclasses.replace(c, picture=None), plan.cases, 101, None) for c in plan.cases
    )
    assert strict.picture is not None
    assert drafted.picture is None


def test_pages_say_that_times_are_a_models_and_the_index_has_every_page(plan, tmp_path):
    report.write(tmp_path / "plans", [plan], "cascade-jax plan --some flags")
    other = dataclasses.replace(plan, device=DEVICES["v5e"], mesh={"data": 1, "model": 4})
    report.write(tmp_path / "plans", [other], "cascade-jax plan --other flags")
    names = {"toy-h100", "toy-v5e-data1-model4"}
    assert {file.stem for file in (tmp_path / "plans").iterdir()} == {*names, "README"}
    text = (tmp_path / "plans" / "toy-h100.md").read_text()
    assert "cascade-jax plan --some flags" in text
    assert "Times are a model's" in text
    assert "models/a.py:7 inner, from middle, outer" in text
    index = (tmp_path / "plans" / "README.md").read_text()
    assert all(f"({name}.md)" in index for name in names)
    stored = json.loads((tmp_path / "plans" / "toy-h100.json").read_text())
    assert stored["cases"][1]["step"]["kernels"] == 99


def test_only_parameters_that_a_method_draws_with_have_to_fit():
    compiler = types.SimpleNamespace(programs=lambda method, batch: {}, device=DEVICES["h100"])
    weights = {"target": 80, "drafter": 10, "vq": 5}
    for tree, drafter, bytes_of_it in (
        (trees.EAGLE_25, None, 95),
        (trees.ROOT, None, 85),
        (trees.chain(4), Jacobi(), 85),
    ):
        method = methods.Method("x", acceptance.strict(), tree, drafter=drafter)
        case = planning._case(compiler, "label", method, 1, weights, EASY, (), None)
        assert (case.method, case.weights, case.needed) == ("label", bytes_of_it, bytes_of_it)


def test_what_does_not_fit_is_said_with_numbers(plan):
    assert report.misfits(plan) == []
    large = dataclasses.replace(plan.cases[0], needed=2 * plan.device.memory, fits=False)
    (line,) = report.misfits(dataclasses.replace(plan, cases=[large]))
    assert line == "ar, batch 1: 169.89 GB are needed on each device, which has 84.94 GB"


def test_libraries_that_are_missing_are_stood_in_for(tmp_path):
    """A library that needs another, which is gone, loads beside a stand-in whose functions all fail."""
    compile_ = lambda name, source, *flags: subprocess.run(
        ["cc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(tmp_path / name), f"-Wl,-soname,{name}", *flags],
        input=source, text=True, check=True,
    )  # fmt: skip
    compile_("libgone.so.7", "int answer(void) { return 42; }")
    flags = f"-L{tmp_path}", "-l:libgone.so.7"
    compile_("libneeds.so", "int answer(void); int asked(void) { return answer(); }", *flags)
    (tmp_path / "libgone.so.7").unlink()
    with pytest.raises(OSError, match=r"libgone\.so\.7"):
        ctypes.CDLL(str(tmp_path / "libneeds.so"))
    assert rocm.stand_in(tmp_path / "libneeds.so") == ["libgone.so.7"]
    assert ctypes.CDLL(str(tmp_path / "libneeds.so")).asked() == 100
    assert rocm.stand_in(tmp_path / "libneeds.so") == []


def run_plan(*flags: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, as a test's own compiles without most optimisations."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-m", "cascade_jax", "plan", *flags], env=env, capture_output=True, text=True, check=False
    )


def shallow(tmp_path: pathlib.Path, name: str, layers: int) -> str:
    """A folder with the configuration alone of published sizes, but of few layers."""
    config = shapes.config_of(name)
    config = dataclasses.replace(config, target=dataclasses.replace(config.target, layers=layers))
    settings = {"format": bundles.FORMAT, **bundles.to_json(config)}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return str(tmp_path)


@cuda
def test_kernels_of_a_step_do_not_grow_back(tmp_path):
    """Of two of LlamaGen-XL's layers on an H100: 43 and 169 when this was written, a tenth more. No large copies."""
    flags = "--device", "h100", "--method", "ar,cascade", "--programs", "step", "--json"
    done = run_plan("--model", shallow(tmp_path, "llamagen-xl", 2), *flags)
    assert done.returncode == 0, done.stderr
    strict, drafted = json.loads(done.stdout)[0]["cases"]
    assert strict["step"]["kernels"] <= 47
    assert drafted["step"]["kernels"] <= 186
    assert drafted["programs"]["step"]["copies"]["count"] == 0


@cuda
@pytest.mark.parametrize("name", ["simplear-0.5b", "liquid-7b"])
def test_kin_of_qwen_and_gemma_are_planned(name, tmp_path):
    """One layer and head of the published sizes; seven query heads to a key head, or heads of 256."""
    flags = "--device", "h100", "--method", "ar,pac", "--programs", "step", "--json"
    done = run_plan("--model", shallow(tmp_path, name, 1), *flags)
    assert done.returncode == 0, done.stderr
    alone, drafted = json.loads(done.stdout)[0]["cases"]
    assert 0 < alone["step"]["kernels"] <= drafted["step"]["kernels"]


def test_published_sizes_have_the_tokenizer_of_their_codes():
    for name in shapes.SHAPES:
        config = shapes.config_of(name)
        assert config.vq.codebook_size == config.target.codebook_size
        assert bundles.from_json(json.loads(json.dumps(bundles.to_json(config)))) == config


@cuda
def test_scenes_is_planned_in_a_fresh_process(tmp_path):
    done = run_plan("--device", "h100", "--alpha", "2.5", "--out", str(tmp_path / "plans"))
    assert done.returncode == 0, done.stderr
    assert "Where a step's time goes: cascade, batch 1" in done.stdout
    assert "models/transformer.py:" in done.stdout
    assert (tmp_path / "plans" / "scenes-h100.md").exists()


@amd
def test_an_mi300x_is_planned_for_without_rocm():
    done = run_plan("--device", "mi300x", "--programs", "step", "--json")
    assert done.returncode == 0, done.stderr
    strict, drafted = json.loads(done.stdout)[0]["cases"]
    assert 50 < strict["step"]["kernels"] < drafted["step"]["kernels"]


@tpu
def test_a_mesh_lists_its_exchanges(tmp_path):
    config = tiny_bundles.config("janus")
    (tmp_path / "config.json").write_text(json.dumps({"format": bundles.FORMAT, **bundles.to_json(config)}))
    flags = "--device", "v5e", "--method", "ar", "--mesh", "model=4", "--json"
    done = run_plan("--model", str(tmp_path), *flags)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(done.stdout)[0]["cases"]
    assert {exchange["devices"] for exchange in case["programs"]["loop"]["collectives"]} >= {4}


@tpu
def test_what_a_compiler_finds_no_room_for_ends_with_status_2(tmp_path):
    flags = "--device", "v5e", "--method", "ar", "--programs", "step", "--batch", "4096"
    done = run_plan("--model", shallow(tmp_path, "llamagen-xl", 1), *flags)
    assert done.returncode == 2
    assert "does not fit" in done.stderr or "do not fit" in done.stderr
    assert "Traceback" not in done.stderr
