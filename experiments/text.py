"""Table 4 at small scale: the effect of image training on text.

Claim (section 4.2): diffusion on images costs little text quality (C4 perplexity 10.1 to 10.4). Chameleon costs more: its
changes for stability and its loss on image tokens each add about half (11.0, 11.8).

The text-only runs use a third of the rows, which is the share of text in the mixture: 1.53 million positions; a third of
Transfusion's positions is 1.51 and of Chameleon's 1.42. Of the four changes for stability only post-norm and z-loss are
tested: all rows normalise queries and keys, and use the same learning rate. Perplexity is a function of bits per byte: 3 %
of perplexity are 1 % of these bits, at 2 bytes per token.

    python -m experiments.text
"""

from functools import partial

from experiments import lab, multimodal
from experiments.lab import Claim, Table
from experiments.multimodal import COLUMNS, make_variant, measure
from experiments.scenes import PRESETS


def build_table(preset: str) -> Table:
    level = PRESETS[preset].level
    return Table(
        "text",
        (
            make_variant(preset, level, "Llama, text alone", "llama", paper={"bits_per_byte": "10.1 (C4, perplexity)"}),
            make_variant(preset, level, "Transfusion: + diffusion", "transfusion", paper={"bits_per_byte": "10.4"}),
            make_variant(preset, level, "Chameleon, text alone: + post-norm, z-loss", "chameleon, text",
                         paper={"bits_per_byte": "11.0"}),
            make_variant(preset, level, "Chameleon: + codes", "chameleon", paper={"bits_per_byte": "11.8"}),
        ),
        {name: COLUMNS[name] for name in ("bits_per_byte", "positions")},
        measure(level),
        (
            Claim("Transfusion's text is non-inferior to text alone within 3 % of perplexity", "bits_per_byte",
                  "Transfusion: + diffusion", "Llama, text alone", margin=0.01),
            Claim("Transfusion's text is better than Chameleon's", "bits_per_byte", "Transfusion: + diffusion",
                  "Chameleon: + codes"),
            Claim("post-norm and z-loss cost text quality", "bits_per_byte", "Llama, text alone",
                  "Chameleon, text alone: + post-norm, z-loss"),
        ),
        partial(multimodal.prepare, level),
    )  # fmt: skip


if __name__ == "__main__":
    options = lab.parse_options(__doc__)
    lab.run_table(options, build_table(options.preset))
