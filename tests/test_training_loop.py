import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cascade_jax import files, interrupts
from cascade_jax.training import checkpoints, loop

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def _params():
    return {"w": jax.random.normal(jax.random.key(0), (8, 4)), "b": jnp.zeros(4)}


def _batch(step):
    rng = np.random.default_rng(step)
    return {"x": rng.standard_normal((16, 8), np.float32), "y": rng.standard_normal((16, 4), np.float32)}


def _loss(params, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["y"].shape)
    error = jnp.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"] + noise
    return jnp.mean(error**2), {"worst": jnp.max(jnp.abs(error))}


def _fit(folder, **changes):
    arguments = dict(steps=20, save_every=6, log_every=4, settings={"rate": 1e-2}) | changes
    batch_fn = arguments.pop("batch_fn", _batch)
    return loop.fit(arguments.pop("loss_fn", _loss), _params(), OPTIMIZER, batch_fn, folder=folder, **arguments)


def _interrupted_at(last):
    def batch_fn(step):
        if step == last:
            raise KeyboardInterrupt
        return _batch(step)

    return batch_fn


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run ends with that nothing stops."""
    return _fit(tmp_path_factory.mktemp("runs") / "whole")


def test_an_interrupted_run_ends_with_the_same_bits(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "parts", batch_fn=_interrupted_at(15))
    parts = _fit(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    restored = checkpoints.restore(tmp_path / "parts", _params())
    jax.tree.map(np.testing.assert_array_equal, whole, restored)


def test_a_killed_run_ends_with_the_same_bits_and_belongs_to_one_process_while_it_lives(whole, tmp_path):
    script = textwrap.dedent("""
        import sys, time
        sys.path.insert(0, sys.argv[2])
        import conftest  # its settings, or else the same program is compiled to other bits
        import test_training_loop as t
        def batch_fn(step):
            if step == 15:
                print("now", flush=True)
                time.sleep(60)
            return t._batch(step)
        t._fit(sys.argv[1], batch_fn=batch_fn)
    """)
    here = pathlib.Path(__file__).parent
    command = [sys.executable, "-c", script, str(tmp_path / "killed"), str(here)]
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    # Batch 15 is asked for ahead of time, so the kill may fall into any of the steps before it, or into a save.
    while "now" not in process.stdout.readline():
        assert process.poll() is None
    with pytest.raises(files.InUse, match=rf"killed is in use by process {process.pid} on "):
        _fit(tmp_path / "killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    jax.tree.map(np.testing.assert_array_equal, whole, _fit(tmp_path / "killed"))


def test_a_run_that_was_asked_to_stop_saves_the_step_under_way_and_ends_with_the_same_bits(whole, tmp_path):
    def asked_at(step):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return _batch(step)

    with (
        interrupts.watch(),
        pytest.raises(interrupts.Interrupted, match=r"stopped after step \d+, which .*parts keeps"),
    ):
        _fit(tmp_path / "parts", batch_fn=asked_at)
    saved = max(int(path.name) for path in (tmp_path / "parts" / "checkpoints").iterdir())
    assert 0 < saved < 12  # another thread makes the batch, ahead of time
    jax.tree.map(np.testing.assert_array_equal, whole, _fit(tmp_path / "parts"))


def test_a_run_that_was_stopped_while_it_is_evaluated_evaluates_again(tmp_path):
    def stop(params):
        raise interrupts.Interrupted

    def fit(folder, evaluate=lambda params: {"alpha": float(jnp.sum(params["w"]))}):
        return _fit(folder, evaluate=evaluate, evaluate_every=5)

    with pytest.raises(interrupts.Interrupted, match="stopped after step 5, which"):
        fit(tmp_path / "parts", stop)
    for folder in ("whole", "parts"):
        fit(tmp_path / folder)
    whole, parts = ((tmp_path / folder / "evaluation.csv").read_text() for folder in ("whole", "parts"))
    assert whole == parts
    assert len(whole.splitlines()) == 5


def _cut(checkpoint: pathlib.Path) -> None:
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _emptied(checkpoint: pathlib.Path) -> None:
    shutil.rmtree(checkpoint / "params")


@pytest.mark.parametrize("damage", [_cut, _emptied])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it_and_named(damage, whole, tmp_path, capfd):
    folder, seen = tmp_path / "parts", {}

    def fit(**changes):
        def evaluate(params):
            seen[len(seen) + 1] = jax.tree.map(np.array, params)
            return {"alpha": 0.0}

        return _fit(folder, evaluate=evaluate, evaluate_every=6, **changes)

    with pytest.raises(KeyboardInterrupt):
        fit(batch_fn=_interrupted_at(17))
    place = folder / "checkpoints" / "12"
    damage(place)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(folder, _params()), seen[1])
    jax.tree.map(np.testing.assert_array_equal, fit(), whole)
    told = [line for line in capfd.readouterr().err.splitlines() if "is damaged" in line]
    assert len(told) == 2  # of `restore` and of `fit`
    assert all(line.startswith(f"{place} is damaged (") and line.endswith("; in its place: 6") for line in told)
    assert (folder / "damaged" / "checkpoints-12").is_dir()


def test_checkpoints_that_are_all_damaged_are_not_begun_over(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path, batch_fn=_interrupted_at(17))
    _cut(tmp_path / "checkpoints")
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* can be read \(12: .*; 6: .*\): remove them to begin again"
    ):
        _fit(tmp_path)


def test_a_damaged_best_is_passed_over_for_the_one_before_it_or_else_the_newest(tmp_path, capfd):
    figures, seen = iter([1.0, 3.0, 2.0, 2.5]), []

    def evaluate(params):
        seen.append(jax.tree.map(np.array, params))
        return {"alpha": next(figures)}

    last = _fit(tmp_path, evaluate=evaluate, evaluate_every=5)
    _cut(tmp_path / "best" / "10")
    best = lambda: checkpoints.restore(tmp_path, last, checkpoints.BEST)
    jax.tree.map(np.testing.assert_array_equal, best(), seen[0])
    assert "best/10 is damaged" in capfd.readouterr().err
    _fit(tmp_path, evaluate=evaluate, evaluate_every=5)
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["5"]
    _cut(tmp_path / "best" / "5")
    jax.tree.map(np.testing.assert_array_equal, best(), seen[3])


def test_a_log_that_a_kill_cut_short_is_gone_on_with(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path, batch_fn=_interrupted_at(17))
    log = tmp_path / "log.csv"
    log.write_text(log.read_text()[:-9])
    _fit(tmp_path)
    assert log.read_text().splitlines()[-1].startswith("20,")
    log.write_text("")
    _fit(tmp_path)


def test_a_finished_run_is_not_run_again(tmp_path):
    first = _fit(tmp_path)
    again = _fit(tmp_path, batch_fn=lambda step: pytest.fail("asked for a batch"))
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_the_callers_parameters_stay_valid(tmp_path):
    params = _params()
    loop.fit(_loss, params, OPTIMIZER, _batch, steps=2, folder=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, _params())


def test_other_settings_are_refused_by_name(tmp_path):
    _fit(tmp_path)
    with pytest.raises(ValueError, match=r"rate: 0.01 there, 0.1 now"):
        _fit(tmp_path, settings={"rate": 0.1})
    with pytest.raises(ValueError, match=r"steps: 20 there, 30 now"):
        _fit(tmp_path, steps=30)
    assert json.loads((tmp_path / "settings.json").read_text()) == {"rate": 0.01, "steps": 20, "seed": 0}


def test_tuples_in_settings_equal_the_lists_they_are_saved_as(tmp_path):
    _fit(tmp_path, settings={"widths": (1, 2)})
    _fit(tmp_path, settings={"widths": (1, 2)})


def test_the_log_has_one_line_per_interval_also_after_resuming(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path, batch_fn=_interrupted_at(17))
    _fit(tmp_path)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [4, 6, 8, 12, 16, 18, 20]
    assert all(float(row["loss"]) > 0 and float(row["worst"]) > 0 for row in rows)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(whole, tmp_path):
    def broken(step):
        batch = _batch(step)
        return batch if step != 9 else batch | {"y": np.full_like(batch["y"], np.nan)}

    with pytest.raises(FloatingPointError, match=r"nan in step 9 .*checkpoint after 6 steps is kept"):
        _fit(tmp_path, batch_fn=broken)
    restored = checkpoints.restore(tmp_path, _params())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored))
    jax.tree.map(np.testing.assert_array_equal, _fit(tmp_path), whole)


def test_revisions_happen_at_their_steps_and_survive_interruption(tmp_path):
    def revise(step, params):
        return params | {"b": params["b"] + step}

    def still(params, batch, key):
        return 0.0 * jnp.sum(params["b"]) + 1.0, {}

    def run(folder, **changes):
        return _fit(folder, loss_fn=still, revise=revise, revise_every=7, **changes)

    np.testing.assert_array_equal(run(tmp_path / "whole")["b"], np.full(4, 7.0 + 14.0))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", batch_fn=_interrupted_at(16))
    np.testing.assert_array_equal(run(tmp_path / "parts")["b"], np.full(4, 7.0 + 14.0))


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    def steep(params, batch, key):
        loss, metrics = _loss(params, batch, key)
        return loss + jnp.sum(jnp.sqrt(params["b"] * 0)), metrics  # 0, of infinite slope

    with pytest.raises(FloatingPointError, match=r"the loss or its gradient is nan in step 0 .*no checkpoint yet"):
        _fit(tmp_path, loss_fn=steep, save_every=1)


def test_the_best_evaluation_is_kept_also_over_an_interruption(tmp_path):
    seen = []

    def fit(figures, **changes):
        figures = iter(figures)

        def evaluate(params):
            seen.append(jax.tree.map(np.array, params))
            return {"alpha": next(figures)}

        return _fit(tmp_path, evaluate=evaluate, evaluate_every=5, **changes)

    with pytest.raises(KeyboardInterrupt):
        fit([1.0, 3.0], batch_fn=_interrupted_at(13))
    last = fit([2.0, 2.5])
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(tmp_path, last, checkpoints.BEST), seen[1])
    jax.tree.map(np.testing.assert_array_equal, last, seen[3])
    assert (tmp_path / "evaluation.csv").read_text().split() == ["step,alpha", "5,1.0", "10,3.0", "15,2.0", "20,2.5"]


def test_restoring_from_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoints.restore(tmp_path, _params())
