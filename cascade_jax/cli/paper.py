"""The command that makes the paper's tables and figures: paper."""

import dataclasses
import pathlib
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from cascade_jax import interrupts, methods
from cascade_jax.cli import console, flags
from cascade_jax.cli.command import Command
from cascade_jax.cli.evaluate import parse_methods
from cascade_jax.tree import EAGLE_25

ALL = "all"
_OWN = "(default: the table's)"


@dataclasses.dataclass(frozen=True)
class Paper(Command):
    """What methods draw is shared by all tables of a folder."""

    what: Annotated[Positional[str], arg(metavar="table1|table2|table3a|table3b|figure3|figure4|figure8|...|all")]
    """table1, table2, table3a, table3b, figure3, figure4, figure8, figure9 (and 10), figure13, figure14, or all:
    then what was made of the same model and prompts already stays"""
    methods: flags.commas(default="the paper's") = ()
    """table1: methods in place of the paper's, also with settings and a name: ar, pac, wide=scd:window=32"""
    drafters: flags.commas(metavar="NAME=DIR,...", default="") = ()
    """table2, table3a: folders of the same model with other drafters; table2 has the paper's numbers for the names
    standard and ours; one name for several folders is several runs, and gives their mean and spread"""
    prompts: Annotated[pathlib.Path | None, flags.hint("FILE", "(default: random scenes)")] = None
    """MS-COCO's .json, PartiPrompts' .tsv, .jsonl with a text a line, or a text file with a prompt a line"""
    count: Annotated[int | None, flags.hint("N", "(default: all of the file's, or a few)")] = None
    """prompts, from the first on; a folder that has fewer goes on behind them"""
    timed: flags.Count = 4
    """prompts that are drawn one at a time as well, the methods in turns, to measure times"""
    batch: flags.Count = 16
    """pictures drawn at once"""
    seed: flags.Seed = 0
    """of random scenes and pictures"""
    tau_pos: Annotated[float | None, flags.hint("X", _OWN)] = None
    """cascade: least cosine of interchangeable siblings"""
    tau_seq: Annotated[float | None, flags.hint("X", _OWN)] = None
    """cascade: least cosine of a token and its converging children"""
    budget: Annotated[float | None, flags.hint("X", _OWN)] = None
    """cascade: the most that a step may charge to its ledger"""
    out: flags.Out = pathlib.Path("paper")
    """receives WHAT.md, WHAT.json and pictures; what methods draw goes to its folder run, which all tables share"""
    model: OmitArgPrefixes[flags.Model] = flags.Model()
    sampling: OmitArgPrefixes[flags.Draws] = flags.Draws()
    metrics: OmitArgPrefixes[flags.Metrics] = flags.Metrics()

    def check(self):
        flags.at_least(1, count=self.count, batch=self.batch)
        flags.at_least(0, timed=self.timed)
        flags.check_seed(self.seed)
        self.metrics.check()
        self.model.check()
        from cascade_jax import files, pipeline
        from cascade_jax.paper.contents import CONTENTS
        from cascade_jax.text import captions

        folders = parse_drafters(self.drafters)
        wanted = self._wanted(CONTENTS, bool(folders))
        if self.methods and not all(CONTENTS[name].methods for name in wanted):
            able = [name for name, entry in CONTENTS.items() if entry.methods]
            raise ValueError(f"{self.what} takes no other methods; {' and '.join(able)} does")
        chosen = parse_methods(self.methods) if self.methods else {}
        for place in folders.values():
            pipeline.folder(place)
        files.check_folder(self.out)
        if self.prompts is not None:
            captions.read(self.prompts, self.count)
        return wanted, folders, chosen

    def owns(self) -> pathlib.Path:
        return self.out

    def load(self, checked):
        from cascade_jax import pipeline
        from cascade_jax.paper import lab as labs

        wanted, folders, chosen = checked
        # the methods' own trees and the paper's, whatever fits this machine
        bundle = dataclasses.replace(self.model.load(), trees={}, tree=EAGLE_25)
        drafters = {name: labs.with_drafter(bundle, pipeline.load(place)) for name, place in folders.items()}
        thresholds = {"tau_pos": self.tau_pos, "tau_seq": self.tau_seq, "budget": self.budget}
        thresholds = {name: x for name, x in thresholds.items() if x is not None}
        of_cascade = lambda name: thresholds if name == methods.CASCADE else {}
        lab = labs.Lab(
            bundle, (), self.out, drafters,
            {label: flags.drawable(bundle, name, of_cascade(name) | own) for label, (name, own) in chosen.items()},
            thresholds, parti=self.prompts is not None and self.prompts.suffix.lower() == ".tsv", seed=self.seed,
            batch=self.batch, timed=self.timed, sampling=self.sampling.of(bundle)[1],
            weights=labs.weighed(bundle, drafters),
        )  # fmt: skip
        return lab, wanted

    def run(self, loaded, line) -> None:
        from cascade_jax.paper.contents import CONTENTS

        (lab, wanted), gauges = loaded, ()
        with console.bad_input():
            if any(CONTENTS[name].judged for name in wanted):
                with console.bar("") as progress:
                    say = lambda what, done, total: progress(done, total, what)
                    gauges = self.metrics.opened(lab.bundle, self.out, say)
            for name in interrupts.safely(wanted):
                own = gauges if CONTENTS[name].judged else ()
                self._make(dataclasses.replace(lab, gauges=own), name, CONTENTS[name], line)

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
        """The captions that were asked for."""
        from cascade_jax.text import captions

        given = None if self.prompts is None else captions.read(self.prompts, count)
        return flags.captions(bundle, given, self.prompts, count, self.seed)

    def _make(self, lab, name: str, entry, line: str) -> None:
        """Makes a table or figure and writes it; of everything, what was made of the same already stays."""
        from cascade_jax.evaluation.metrics.metric import cautions
        from cascade_jax.paper import pages
        from cascade_jax.paper.contents import COUNT

        usual = COUNT if self.prompts is None else None
        count = self.count or entry.count or usual
        if self.what == ALL and entry.count:  # figures of a few pictures stay so among all
            count = min(count or entry.count, entry.count)
        lab = dataclasses.replace(lab, captions=self._captions(lab.bundle, count))
        if self.what == ALL and pages.made(lab, name):
            print(f"made already: {self.out / name}.md")
            return
        with console.bar("") as progress, cautions() as careful:
            lab = dataclasses.replace(lab, progress=lambda what, done, total: progress(done, total, what))
            result = entry.make(lab)
            written = pages.write(lab, result, line)
        if result.rows:
            print(pages.markdown(lab, result, line))
        for text in careful:
            console.say(text)
        print(f"written to {self.out}: {', '.join(written)}")

    def kept(self) -> str:
        return f"{self.out / 'run'} keeps every finished picture; the same command goes on there"


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
