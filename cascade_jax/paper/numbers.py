"""What the paper reports (CASCADE, arXiv 2605.07230): its tables, and the settings and figures in captions and text.

Methods have this package's names: the paper's "AR" is "ar", its "Naive" is "eagle". Its alpha is 1.0 for AR, where no
draft is accepted; elsewhere it is the mean number of accepted drafts per step.
"""

from typing import NamedTuple

from cascade_jax.methods import AR, CASCADE, EAGLE, GSD, LANTERN, LANTERN_PP

LLAMAGEN, LUMINA, JANUS = "LlamaGen-XL-Stage2", "Lumina-mGPT-7B-768", "JanusPro-7B"
COCO, PARTI = "MSCOCO 2017", "Parti-Prompts"


class Numbers(NamedTuple):
    """A row of a table.

    Attributes:
      speedup: over AR's wall-clock time.
      alpha: mean acceptance length.
      fid: Fréchet Inception distance, lower is better; None where the paper has none.
      clip: CLIP score, higher is better; likewise.
    """

    speedup: float
    alpha: float
    fid: float | None
    clip: float | None


# How the paper prints them.
FORMS = Numbers(speedup="{:.1f}x", alpha="{:.1f}", fid="{:.1f}", clip="{:.2f}")._asdict()

# Table 1: methods, all on EAGLE-1 drafters, by model and captions.
TABLE_1 = {
    (LLAMAGEN, COCO): {
        AR: Numbers(1.0, 1.0, 40.5, 0.29),
        EAGLE: Numbers(1.8, 1.3, 40.8, 0.29),
        LANTERN: Numbers(1.7, 1.4, 47.4, 0.29),
        LANTERN_PP: Numbers(1.9, 1.9, 42.1, 0.29),
        GSD: Numbers(2.8, 2.6, 37.7, 0.29),
        CASCADE: Numbers(3.3, 3.8, 40.4, 0.29),
    },
    (LLAMAGEN, PARTI): {
        AR: Numbers(1.0, 1.0, None, 0.27),
        EAGLE: Numbers(1.8, 1.4, None, 0.27),
        LANTERN: Numbers(1.7, 1.4, None, 0.27),
        LANTERN_PP: Numbers(2.1, 1.9, None, 0.27),
        GSD: Numbers(1.7, 1.6, None, 0.26),
        CASCADE: Numbers(3.4, 3.9, None, 0.28),
    },
    (LUMINA, COCO): {
        AR: Numbers(1.0, 1.0, 29.4, 0.33),
        EAGLE: Numbers(2.1, 1.8, 28.8, 0.33),
        LANTERN_PP: Numbers(2.4, 1.7, 33.2, 0.33),
        GSD: Numbers(2.5, 2.5, 31.0, 0.33),
        CASCADE: Numbers(3.0, 2.6, 31.3, 0.33),
    },
    (JANUS, COCO): {
        AR: Numbers(1.0, 1.0, 27.0, 0.34),
        EAGLE: Numbers(1.3, 1.2, 26.4, 0.32),
        GSD: Numbers(1.2, 1.0, 25.9, 0.34),
        CASCADE: Numbers(1.8, 2.5, 27.1, 0.32),
    },
}

# Thresholds tau_pos and tau_seq of table 1.
THRESHOLDS = {LLAMAGEN: (0.85, 0.5), LUMINA: (0.95, 0.925), JANUS: (0.85, 0.5)}

# Table 2: the standard drafter and the paper's own, LlamaGen on MS-COCO; cascade at TABLE_2_THRESHOLDS.
TABLE_2 = {
    (LANTERN_PP, "standard"): Numbers(1.9, 1.9, 42.1, 0.29),
    (LANTERN_PP, "ours"): Numbers(2.3, 2.3, 40.1, 0.29),
    (GSD, "standard"): Numbers(2.8, 2.6, 37.7, 0.29),
    (GSD, "ours"): Numbers(2.9, 2.9, 37.2, 0.29),
    (CASCADE, "standard"): Numbers(3.6, 3.9, 43.1, 0.29),
    (CASCADE, "ours"): Numbers(3.6, 4.0, 40.6, 0.29),
}
TABLE_2_THRESHOLDS = (0.8, 0.5)  # tau_pos, tau_seq

# Table 3 (a): methods on an EAGLE-3 drafter, LlamaGen on Parti-Prompts; cascade at TABLE_3A_TAU_POS.
TABLE_3A = {
    EAGLE: Numbers(1.6, 1.1, None, 0.28),
    LANTERN: Numbers(1.4, 1.1, None, 0.27),
    LANTERN_PP: Numbers(1.7, 1.4, None, 0.28),
    GSD: Numbers(1.4, 0.8, None, 0.27),
    CASCADE: Numbers(2.5, 2.8, None, 0.27),
}
TABLE_3A_TAU_POS = 0.8

# Table 3 (b): relaxation by I and C alone and by both, LlamaGen at the thresholds of table 1.
TABLE_3B = {
    PARTI: {
        "i": Numbers(2.8, 2.8, None, 0.28),
        "c": Numbers(2.8, 2.8, None, 0.28),
        "i+c": Numbers(3.4, 3.9, None, 0.28),
    },
    COCO: {
        "i": Numbers(2.7, 2.7, 41.4, 0.29),
        "c": Numbers(2.7, 2.7, 38.9, 0.29),
        "i+c": Numbers(3.3, 3.8, 40.4, 0.29),
    },
}

# Figure 4: thresholds of the trade-off curve from left to right, TVD capped at 0.5. The curve's points are not printed;
# those known from tables 1 and 2 are (speedup, FID) with the standard drafter.
FIGURE_4_THRESHOLDS = ((0.85, 0.625), (0.85, 0.5), (0.8, 0.5))
FIGURE_4_POINTS = {(0.85, 0.5): (3.3, 40.4), (0.8, 0.5): (3.6, 43.1)}
BUDGET = 0.5

# Figure 13: budgets and the alpha of one picture at thresholds 0.8, 0.5, LlamaGen.
FIGURE_13_THRESHOLDS = (0.8, 0.5)
FIGURE_13 = {0.0005: 2.3, 0.001: 2.5, 0.5: 3.9}

# Figure 14: tau_pos and tau_seq of its pictures; None where that relaxation is off.
FIGURE_14_THRESHOLDS = ((0.9, None), (None, 0.625), (0.9, 0.25))

# Section 5.1: total variation distance accumulated over a picture, and its output tokens.
TVD = {LLAMAGEN: (1.3, 1024), LUMINA: (2.2, 2356)}

# Models of the paper by the families of this package.
FAMILIES = {"llamagen": LLAMAGEN, "chameleon": LUMINA, "janus": JANUS}
