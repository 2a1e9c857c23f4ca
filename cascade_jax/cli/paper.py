"""The command that makes the paper's tables and figures: paper."""

import dataclasses
import pathlib
import warnings
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from cascade_jax.cli import console
from cascade_jax.cli.evaluation import Metrics
from cascade_jax.cli.scale import (
    at_least_one,
    check_seed,
    parse_settings,
    referee_for,
    sampling_of,
    sampling_settings,
)

_USUAL = Metrics()
_OWN = "(default: the table's)"


@dataclasses.dataclass(frozen=True)
class Paper:
    """Make a table or figure of the paper with a model, beside the paper's own numbers; it goes on where it stopped."""

    what: Annotated[Positional[str], arg(metavar="table1|table2|table3a|table3b|figure3|figure4|figure8|...")]
    """table1, table2, table3a, table3b, figure3, figure4, figure8, figure9 (and 10), figure13 or figure14"""
    model: Annotated[str, arg(metavar="MODEL")] = "scenes"
    """scenes, or the folder of a converted model"""
    drafters: Annotated[tuple[str, ...], arg(metavar="NAME=DIR...", help_behavior_hint="")] = ()
    """table2, table3a: folders of the same model with other drafters; table2 has the paper's numbers for the names
    standard and ours; one name for several folders is several runs, and gives their mean and spread"""
    captions: Annotated[pathlib.Path | None, arg(metavar="FILE", help_behavior_hint="(default: random scenes)")] = None
    """MS-COCO's .json, PartiPrompts' .tsv, .jsonl with a text a line, or a text file with a caption a line"""
    count: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all of the file's, or a few)")] = None
    """captions, from the first on; what shares a folder has the same"""
    timed: Annotated[int, arg(metavar="N")] = 4
    """captions that are drawn one at a time as well, the methods in turns, to measure times"""
    batch: Annotated[int, arg(metavar="N")] = 16
    """pictures drawn at once"""
    seed: Annotated[int, arg(metavar="N")] = 0
    """of random scenes and pictures"""
    sampling: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE...", help_behavior_hint="(default: the model's)")] = ()
    """temperature, top_k, top_p, guidance; what shares a folder has the same"""
    tau_pos: Annotated[float | None, arg(metavar="X", help_behavior_hint=_OWN)] = None
    """cascade: least cosine of interchangeable siblings"""
    tau_seq: Annotated[float | None, arg(metavar="X", help_behavior_hint=_OWN)] = None
    """cascade: least cosine of a token and its converging children"""
    budget: Annotated[float | None, arg(metavar="X", help_behavior_hint=_OWN)] = None
    """cascade: the most that a step may charge to its ledger"""
    out: Annotated[pathlib.Path, arg(metavar="DIR")] = pathlib.Path("paper")
    """receives WHAT.md, WHAT.json and pictures; what methods draw goes to its folder run, which all tables share"""
    metrics: OmitArgPrefixes[Metrics] = _USUAL

    def run(self, command: str) -> None:
        with console.bad_input():
            self._check()
            from cascade_jax import pipeline
            from cascade_jax.evaluation import files
            from cascade_jax.evaluation.metrics import fid
            from cascade_jax.paper import tables as paper
            from cascade_jax.text import captions

            if self.what not in paper.WHAT:
                raise ValueError(f"unknown table or figure {self.what!r}; known: {', '.join(paper.WHAT)}")
            folders, settings = parse_drafters(self.drafters), parse_settings(self.sampling)
            if folders and self.what not in paper.WITH_DRAFTERS:
                raise ValueError(f"{self.what} takes no other drafters; {' and '.join(paper.WITH_DRAFTERS)} do")
            if not folders and self.what in paper.WITH_DRAFTERS:
                raise ValueError(f"{self.what} compares drafters: give others with --drafters NAME=DIR")
            for place in (self.model, *folders.values()):
                pipeline.folder(place)
            files.check_folder(self.out)
            given = None if self.captions is None else captions.read(self.captions, self.count)
        console.set_up()
        with console.bad_input():
            scorer, network = self.metrics.networks()
            bundle = pipeline.load(self.model)
            bundle.trees.clear()  # tables are of the methods' own trees, whatever tune-tree found for this machine
            if given is None:
                if bundle.config.text != "scenes":
                    raise ValueError("this model has no captions of its own: give --captions FILE")
                given = captions.read("scenes", self.count or paper.COUNTS.get(self.what, 64), self.seed)
            captions.check(bundle, given, self.captions)
            sampling = sampling_of(sampling_settings(bundle, settings))
            drafters = {name: paper.with_drafter(bundle, pipeline.load(place)) for name, place in folders.items()}
            wanted = {"tau_pos": self.tau_pos, "tau_seq": self.tau_seq, "budget": self.budget}
            lab = paper.Lab(
                bundle, given, self.out, drafters, {name: x for name, x in wanted.items() if x is not None},
                parti=self.captions is not None and self.captions.suffix.lower() == ".tsv", seed=self.seed,
                batch=self.batch, timed=self.timed, sampling=sampling,
                referee=None if self.what in paper.UNJUDGED else referee_for(bundle, self.metrics.judge), clip=scorer,
            )  # fmt: skip
        with console.bar("") as progress, console.bad_input(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", fid.FewPictures)
            say = lambda what, done, total: progress(done, total, what)
            distance = self.metrics.distance(network, self.out, say)
            lab = dataclasses.replace(lab, fid=distance, progress=say)
            result = paper.WHAT[self.what](lab)
        written = paper.write(lab, result, command)
        if result.rows:
            print(paper.markdown(lab, result, command))
        for text in dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, fid.FewPictures)):
            console.say(text)
        print(f"written to {self.out}: {', '.join(written)}")

    def _check(self) -> None:
        for name in ("count", "batch"):
            at_least_one(name, getattr(self, name))
        if self.timed < 0:
            raise ValueError(f"timed must be at least 0, not {self.timed}")
        check_seed(self.seed)
        self.metrics.check()


def parse_drafters(texts: tuple[str, ...]) -> dict[str, pathlib.Path]:
    """Folders of models by name, of texts such as "ours=run/model"; a name that comes again gets numbers, "ours#1".

    Raises:
      ValueError: if one is none.
    """
    found: dict[str, list[pathlib.Path]] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not (name and equals and place) or "#" in name:
            raise ValueError(f"drafters are NAME=DIR, not {text!r}")
        found.setdefault(name, []).append(pathlib.Path(place))
    return {
        name if len(places) == 1 else f"{name}#{number}": place
        for name, places in found.items()
        for number, place in enumerate(places, 1)
    }
