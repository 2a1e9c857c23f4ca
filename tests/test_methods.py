"""The registry of methods: what is registered can be drawn by; and nothing outside a registry names what is in one."""

import ast
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from small import DRAFTER, write_bundle

from cascade_jax import acceptance, cli, mesh, methods, pipeline, platforms, trees
from cascade_jax import bundle as bundles
from cascade_jax.cli import flags
from cascade_jax.draft import Draft
from cascade_jax.evaluation import metrics
from cascade_jax.methods import METHODS, Entry, Setting
from cascade_jax.models.families import KINDS

ROOT = pathlib.Path(cli.__file__).parents[1]


@struct.dataclass
class Nothing:
    last: jax.Array = mesh.by_sequence()


class Same(nnx.Module):
    """Drafts one token over and over; it has no parameters, and the token is a setting."""

    memory, taps, reads_laws = Nothing, (), False

    def __init__(self, token: int):
        self.token = token

    def start(self, target, tree, prefix, features, first, slots, layout=None):
        return Nothing(first)

    def propose(self, target, tree, memory, keys, sampling, position, layout=None, noise=None):
        drafts = jnp.full((len(memory.last), tree.num_nodes - 1), self.token, memory.last.dtype)
        return Draft(jnp.concatenate([memory.last[:, None], drafts], axis=1), None, None), memory

    def observe(self, target, memory, outcome):
        last = jnp.take_along_axis(outcome.emitted, outcome.accepted[:, None], axis=1)[:, 0]
        return Nothing(jnp.where(outcome.kept > 0, last, memory.last))


SAME = Entry(
    "same",
    "drafts one token over and over",
    lambda bundle, settings: acceptance.strict(),
    (
        Setting("token", int, "which token", lambda config: config.vq.codebook_size - 1),
        Setting("reach", int, "how many drafts", lambda config: 2),
    ),
    tree=lambda settings: trees.chain(settings["reach"]),
    bound="drafts as far as its reach",
    drafter=lambda bundle, settings: Same(settings["token"]),
    compared=False,
)


@pytest.fixture
def same(monkeypatch):
    monkeypatch.setitem(METHODS, "same", SAME)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return pipeline.load(write_bundle(tmp_path_factory.mktemp("methods") / "model", drafter=False))


@pytest.mark.parametrize("name", METHODS)
def test_every_registered_method_has_a_rule_a_tree_and_all_its_settings(name, bundle):
    made = methods.method(name, bundle)
    assert tuple(made.settings) == methods.takes(name)
    assert callable(made.rule.offer) and callable(made.rule.decide)
    assert made.tree.num_nodes >= 1
    assert METHODS[name].about and METHODS[name].name == name


def test_a_drafter_of_the_methods_own_needs_none_of_the_model(same, bundle):
    prompts = bundle.encode(["a red ball on gravel"])
    likely = methods.draw_one(bundle, methods.method("ar", bundle), prompts[0], 0, 0).tokens[0]
    token = int(np.bincount(likely).argmax())
    method = methods.method("same", bundle, token=token, reach=3)
    assert (method.tree, method.settings) == (trees.chain(3), {"token": token, "reach": 3})
    ((_, drawn),) = methods.draw_all(bundle, method, prompts * 8, seed=0)
    assert drawn.stats.accepted.sum() > 0
    assert (drawn.stats.steps + drawn.stats.accepted == bundle.length - 1).all()
    assert bundle.drafter is None and bundle.params["drafter"] is None


def test_a_methods_tree_may_be_bound_to_its_settings(same, bundle):
    with pytest.raises(ValueError, match="same drafts as far as its reach: name another method"):
        methods.method("same", bundle, tree="chain:4")


def test_defaults_flags_and_what_is_compared_follow_the_registry(same, bundle):
    assert methods.method("same", bundle).settings == {"token": 63, "reach": 2}
    flags = {setting.name: takers for setting, takers in methods.settings_of().items()}
    assert flags["reach"] == ("same",)
    assert flags["neighbours"] == ("lantern", "lantern++")
    assert "same" not in methods.compared()
    assert methods.compared()[0] == methods.AR
    assert not methods.tunable("same") and methods.tunable("eagle")


def test_a_model_without_a_drafter_is_drawn_by_a_method_that_needs_none_and_that_is_said(bundle, capsys):
    alone, drafting = (dataclasses.replace(bundle.config, drafter=drafter) for drafter in (None, DRAFTER))
    alone, drafting = (dataclasses.replace(bundle, config=config) for config in (alone, drafting))
    assert methods.usual(drafting) == flags.method_of(drafting, None) == methods.CASCADE
    assert capsys.readouterr().err == ""
    name = flags.method_of(alone, None)
    assert METHODS[name].drafter is not None and methods.method(name, alone).drafter is not None
    assert capsys.readouterr().err.startswith(f"this model has no drafter: drawn by {name}, which needs none")
    assert flags.method_of(alone, methods.AR) == methods.AR


def test_what_is_drafted_where_no_tree_is_named_fits_the_platform(bundle, monkeypatch):
    own = dataclasses.replace(platforms.defaults(), tree="chain:2")
    monkeypatch.setitem(platforms.DEFAULTS, jax.default_backend(), own)
    for name in ("eagle", "gsd", "cascade"):
        drafting = dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, drafter=DRAFTER))
        assert methods.method(name, drafting).tree == drafting.usual_tree == trees.chain(2)
        assert methods.method(name, drafting, tree="eagle25").tree == trees.EAGLE_25
        assert methods.method(name, dataclasses.replace(drafting, tree=trees.EAGLE_25)).tree == trees.EAGLE_25
    assert methods.method("lantern++", drafting).tree == trees.LANTERNPP_57
    with platforms.lowering("cuda"):  # planned for another platform
        assert bundles.abstract(drafting.config).usual_tree == trees.EAGLE_25


def test_settings_cannot_be_called_what_methods_are_made_of():
    with pytest.raises(ValueError, match="a setting cannot be called tree"):
        Entry("x", "", SAME.rule, (Setting("tree", str, "", lambda config: ""),))


def literals(path: pathlib.Path) -> list[tuple[int, str]]:
    """Strings in a file that stand for something: no docstrings, no keyword's or attribute's names, no keys of JSON."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in prose]
    return [(node.lineno, node.value) for node in constants if isinstance(node.value, str)]


# What is written alike and means something else.
OTHERS = {
    "cascade_jax/__init__.py": {"cascade", "lantern", "exact"},  # public functions
    "cascade_jax/rules/__init__.py": {"cascade", "lantern"},
    "cascade_jax/rules/lantern.py": {"lantern"},  # a residual
    "cascade_jax/bundle/config.py": {"cascade"},  # a field of config.json
    "cascade_jax/paper/numbers.py": {"llamagen", "chameleon", "janus"},  # which of its models the paper measured
    "cascade_jax/models/emu3.py": {"emu3"},  # a way of drawing
    "cascade_jax/training/loop.py": {"alpha"},
}
FAMILIES = {name for part in ("target", "drafter") for name in KINDS[part]}
REGISTRIES = {
    "methods": (set(METHODS), "methods.py"),
    "targets and drafters": (FAMILIES, "models/families.py"),
    # Others are called as fields of statistics, ledgers or networks are.
    "metrics": (
        {"fidelity", "frechet", "fid", "step_speedup", "seconds_per_image", "target_steps"},
        "evaluation/metrics",
    ),
}


@pytest.mark.parametrize("what", REGISTRIES)
def test_what_is_registered_is_named_nowhere_else(what):
    names, home = REGISTRIES[what]
    assert what != "metrics" or names <= {metric.name for metric in metrics.METRICS}
    named = [
        f"{place}:{line}: {text!r}"
        for place, path in ((str(path.relative_to(ROOT.parent)), path) for path in sorted(ROOT.rglob("*.py")))
        if not place.startswith(f"cascade_jax/{home}")
        for line, text in literals(path)
        if text in names - OTHERS.get(place, set())
    ]
    assert named == []
