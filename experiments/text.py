"""Table 4 in miniature: what do images cost the text?

Claim (section 4.2): images by diffusion cost little (C4 10.1 to 10.4), Chameleon's changes for stability and its loss on
image tokens about half each of a larger cost (11.0, 11.8). All read equally many positions of text.

So far (one seed or two) text beside images is as good as text alone, and better than Chameleon's. What is done for stability
costs nothing here, where nothing is unstable. (3 minutes of one core for text alone, 9 with images.)

    python -m experiments.text
"""

from functools import partial

from experiments import both, lab
from experiments.both import COLUMNS, measure, variant
from experiments.lab import Claim, Table


def table(scale: str) -> Table:
    return Table(
        "text",
        (
            variant(scale, "Llama, text alone", "llama", paper={"bits_per_byte": "10.1 (C4, perplexity)"}),
            variant(scale, "Transfusion: + diffusion", "transfusion", paper={"bits_per_byte": "10.4"}),
            variant(scale, "Chameleon, text alone: + stability", "chameleon, text", paper={"bits_per_byte": "11.0"}),
            variant(scale, "Chameleon: + codes", "chameleon", paper={"bits_per_byte": "11.8"}),
        ),
        {"bits_per_byte": COLUMNS["bits_per_byte"], "minutes": COLUMNS["minutes"]},
        (
            Claim("text as good as of text alone, to 3 %", "bits_per_byte", "Transfusion: + diffusion", "Llama, text alone",
                  margin=0.03),
            Claim("Transfusion's text beats Chameleon's", "bits_per_byte", "Transfusion: + diffusion", "Chameleon: + codes"),
            Claim("the changes for stability cost text", "bits_per_byte", "Llama, text alone",
                  "Chameleon, text alone: + stability"),
        ),
    )  # fmt: skip


if __name__ == "__main__":
    asked = lab.options(__doc__)
    lab.make(asked, table(asked.scale), partial(measure, asked.scale), both.prepare)
    print(both.codec_quality(asked))
