"""The command that makes the paper's tables and figures: paper."""

import dataclasses
import pathlib
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from cascade_jax.cli import console
from cascade_jax.cli.evaluation import USUAL, Metrics
from cascade_jax.cli.scale import (
    at_least_one,
    check_seed,
    parse_settings,
    sampling_of,
    sampling_settings,
)

ALL = "all"
_OWN = "(default: the table's)"


@dataclasses.dataclass(frozen=True)
class Paper:
    """Make a table or figure of the paper with a model, beside the paper's own numbers; it goes on where it stopped."""

    what: Annotated[Positional[str], arg(metavar="table1|table2|table3a|table3b|figure3|figure4|figure8|...|all")]
    """table1, table2, table3a, table3b, figure3, figure4, figure8, figure9 (and 10), figure13, figure14, or all:
    then what was made of the same model and captions already stays"""
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
    metrics: OmitArgPrefixes[Metrics] = USUAL

    def run(self, command: str) -> None:
        with console.bad_input():
            self._check()
            from cascade_jax import files, pipeline
            from cascade_jax.paper import lab as labs
            from cascade_jax.paper.contents import CONTENTS

            folders, settings = parse_drafters(self.drafters), parse_settings(self.sampling)
            wanted = self._wanted(CONTENTS, bool(folders))
            for place in (self.model, *folders.values()):
                pipeline.folder(place)
            files.check_folder(self.out)
            if self.captions is not None:
                self._captions(None, self.count)
        console.set_up()
        with console.bad_input(), files.owned(self.out):
            bundle = pipeline.load(self.model)
            bundle.trees.clear()  # tables are of the methods' own trees, whatever tune-tree found for this machine
            sampling = sampling_of(sampling_settings(bundle, settings))
            drafters = {name: labs.with_drafter(bundle, pipeline.load(place)) for name, place in folders.items()}
            thresholds = {"tau_pos": self.tau_pos, "tau_seq": self.tau_seq, "budget": self.budget}
            lab = labs.Lab(
                bundle, (), self.out, drafters, {name: x for name, x in thresholds.items() if x is not None},
                parti=self.captions is not None and self.captions.suffix.lower() == ".tsv", seed=self.seed,
                batch=self.batch, timed=self.timed, sampling=sampling, weights=labs.weighed(bundle, drafters),
            )  # fmt: skip
            gauges = ()
            if any(CONTENTS[name].judged for name in wanted):
                with console.bar("") as progress:
                    say = lambda what, done, total: progress(done, total, what)
                    gauges = self.metrics.opened(bundle, self.out, say)
            for name in wanted:
                own = gauges if CONTENTS[name].judged else ()
                self._make(dataclasses.replace(lab, gauges=own), name, CONTENTS[name], command)

    def _wanted(self, contents, drafters: bool) -> list[str]:
        """Names of what is to be made; says on stderr what of everything is left out."""
        if self.what == ALL:
            left = [name for name, entry in contents.items() if entry.drafters and not drafters]
            if left:
                console.say(f"{' and '.join(left)} compare drafters and are left out: give others with --drafters")
            return [name for name in contents if name not in left]
        if self.what not in contents:
            raise ValueError(f"unknown table or figure {self.what!r}; known: {', '.join(contents)}, {ALL}")
        compares = contents[self.what].drafters
        if drafters and not compares:
            able = [name for name, entry in contents.items() if entry.drafters]
            raise ValueError(f"{self.what} takes no other drafters; {' and '.join(able)} do")
        if compares and not drafters:
            raise ValueError(f"{self.what} compares drafters: give others with --drafters NAME=DIR")
        return [self.what]

    def _captions(self, bundle, count: int | None):
        """The captions that were asked for; without a bundle they are read from the file alone."""
        from cascade_jax.text import captions

        if self.captions is not None:
            found = captions.read(self.captions, count)
        elif bundle.config.text != "scenes":
            raise ValueError("this model has no captions of its own: give --captions FILE")
        else:
            found = captions.read("scenes", count, self.seed)
        if bundle is not None:
            captions.check(bundle, found, self.captions)
        return found

    def _make(self, lab, name: str, entry, command: str) -> None:
        """Makes a table or figure and writes it; of everything, what was made of the same already stays."""
        from cascade_jax.evaluation.metrics.metric import cautions
        from cascade_jax.paper import pages
        from cascade_jax.paper.contents import COUNT

        few = entry.count if self.what == ALL else None  # figures of a few pictures stay so among all
        usual = COUNT if self.captions is None else None
        count = few or self.count or entry.count or usual
        lab = dataclasses.replace(lab, captions=self._captions(lab.bundle, count))
        if self.what == ALL and pages.made(lab, name):
            print(f"made already: {self.out / name}.md")
            return
        with console.bar("") as progress, cautions() as careful:
            lab = dataclasses.replace(lab, progress=lambda what, done, total: progress(done, total, what))
            result = entry.make(lab)
            written = pages.write(lab, result, command)
        if result.rows:
            print(pages.markdown(lab, result, command))
        for text in careful:
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
