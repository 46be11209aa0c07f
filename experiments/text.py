"""Table 4 in miniature: what do images cost the text?

Claim (section 4.2): images by diffusion cost little (C4 10.1 to 10.4), Chameleon's changes for stability and its loss on
image tokens about half each of a larger cost (11.0, 11.8).

Text alone has a third of the rows, as large as the share of text in the mixture: 1.53 million positions, where a third of
Transfusion's are 1.51 and of Chameleon's 1.42. Of the four changes for stability only norms behind the layers and the pull
on the logits are tried: all rows normalise queries and keys, and have one learning rate. Perplexity is bits per byte in
another dress: 3 % of it are 1 % of these bits, at 2 bytes a token.

Text beside images is as good as text alone, rather better (three seeds each), and better than Chameleon's (one). What is
done for stability costs nothing that can be measured here, where nothing is unstable. (3 minutes of one core for text alone,
9 with images.)

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
            variant(scale, "Chameleon, text alone: + post-norm, z-loss", "chameleon, text", paper={"bits_per_byte": "11.0"}),
            variant(scale, "Chameleon: + codes", "chameleon", paper={"bits_per_byte": "11.8"}),
        ),
        {name: COLUMNS[name] for name in ("bits_per_byte", "positions", "minutes")},
        (
            Claim("text as good as of text alone, to 3 % of perplexity", "bits_per_byte", "Transfusion: + diffusion",
                  "Llama, text alone", margin=0.01),
            Claim("Transfusion's text beats Chameleon's", "bits_per_byte", "Transfusion: + diffusion", "Chameleon: + codes"),
            Claim("post-norm and z-loss cost text", "bits_per_byte", "Llama, text alone",
                  "Chameleon, text alone: + post-norm, z-loss"),
        ),
    )  # fmt: skip


if __name__ == "__main__":
    asked = lab.options(__doc__)
    lab.make(asked, table(asked.scale), partial(measure, asked.scale), both.prepare)
    print(both.codec_quality(asked))
