"""The paper's six primary claims, each with one metric, and the verdicts on them from five seeds of each row.

They were fixed before any run with these seeds was made. Holm's correction is over the six, whether their runs exist or not.
All other comparisons of the tables have intervals and no verdict.
"""

from dataclasses import dataclass, replace
from types import ModuleType

from experiments import attention, continuous, noise, patches, text
from experiments.judge import Evidence, judge
from experiments.lab import SEEDS, Claim, Options, Table, Variant, compare_rows, read_cells


@dataclass(frozen=True)
class Primary:
    """A claim of the paper, and the claim about two rows of one of our tables that stands for it."""

    paper: str
    module: ModuleType
    text: str

    def find(self, preset: str) -> tuple[Table, Claim]:
        table = self.module.build_table(preset)
        (claim,) = (claim for claim in table.claims if claim.text == self.text)
        return table, claim


CLAIMS = (
    Primary("Transfusion models text better than Chameleon (Table 3)", continuous,
            "Transfusion is better than Chameleon at M, by bits per byte"),
    Primary("Transfusion draws better images than Chameleon (Table 3)", continuous,
            "Transfusion is better than Chameleon at M, by attributes correct"),
    Primary("Bidirectional attention within images is better than causal (Table 5)", attention,
            "bidirectional is better than causal with linear patches, by images correct"),
    Primary("U-Net patches are better than linear ones, here of equal parameters (Tables 6 and 7)", patches,
            "a U-Net is better than linear patches of equal parameters, by images correct, 16 patches"),
    Primary("Limited noise in images that come first improves their captions (Table 8)", noise,
            "the limit improves captions"),
    Primary("Training on images costs little text quality (Table 4)", text,
            "Transfusion's text is non-inferior to text alone within 3 % of perplexity"),
)  # fmt: skip


def find_rows(table: Table, claim: Claim) -> list[Variant]:
    """The two rows of a claim."""
    return [variant for name in (claim.first, claim.second) for variant in table.variants if variant.name == name]


def count_cells(options: Options, primary: Primary) -> int:
    """The number of cells of both rows that exist, of 2 x 5."""
    table, claim = primary.find(options.preset)
    return sum(len(read_cells(options, table, row).keys() & {*SEEDS}) for row in find_rows(table, claim))


def judge_claims(options: Options) -> list[tuple[str, Evidence | None]]:
    """The verdict on each claim, and the evidence so far. A claim is open until its ten cells exist and are of one code; its
    evidence is then of fewer or of old seeds."""
    options = replace(options, seeds=SEEDS)
    evidence = [compare_rows(options, *primary.find(options.preset)) for primary in CLAIMS]
    is_complete = [count_cells(options, primary) == 2 * len(SEEDS) for primary in CLAIMS]
    verdicts = judge([it if complete else None for it, complete in zip(evidence, is_complete, strict=True)])
    return list(zip(verdicts, evidence, strict=True))
