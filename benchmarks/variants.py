"""Do common alternate alleles score higher than rare ones? Means, AUROC with a bootstrap interval, beside simple rules.

    python -m benchmarks.variants VCF FASTA [--model dna] [--common 0.05] [--rare 0.001] [--out variants.json]

VCF is one with allele frequencies (INFO/AF, a value an ALT), such as a release of 1000 Genomes; FASTA holds its
records. A score is the log-likelihood ratio of ALT against REF of `mambagen score-variants`. Selection keeps harmful
alleles rare, so a model of what is usual should find common ones likelier; but mutation itself is uneven, and a common
substitution is oftener a transition. Beside the model stand two rules that know only this (transition or not; a
transition in a CpG or not), and the model's AUROC within classes of the same substitution and CpG context, where such
rules are of no use. Intervals are 95 %, by bootstrap over blocks of neighbouring sites, which are inherited together.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import print_table, write_json
from mambagen.data.sequence_store import SequenceStore
from mambagen.pipelines.likelihood import LanguageModel
from mambagen.pipelines.score_variants import VariantScores, score_variants
from mambagen.pipelines.variant_likelihoods import AFTER, CONTEXT

BLOCK = 10_000  # bases
_OTHER = {"A": "T", "C": "G", "G": "C", "T": "A"}

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def frequencies(vcf: str) -> Floats:
    """INFO/AF of every ALT, in the order of the file; NaN where it is not given."""
    import pysam

    out: list[float] = []
    with pysam.VariantFile(vcf) as file:
        for record in file:
            alts = record.alts or ()
            given = record.info.get("AF", (None,) * len(alts))
            out += [np.nan if value is None else float(value) for value in given]
    return np.array(out)


def auroc(scores: Floats, positive: Mask) -> float:
    """The probability that a positive scores higher than a negative, ties counted half (Mann-Whitney U)."""
    from scipy.stats import rankdata

    ranks = rankdata(scores)
    n, m = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


def within_classes(scores: Floats, positive: Mask, classes: NDArray[np.int64]) -> float:
    """AUROC over pairs of the same class: the mean of the classes' own, weighted by their numbers of pairs."""
    total = weight = 0.0
    for c in np.unique(classes):
        here = classes == c
        pairs = float(positive[here].sum()) * float((~positive[here]).sum())
        if pairs:
            total += pairs * auroc(scores[here], positive[here])
            weight += pairs
    return total / weight if weight else float("nan")


def bootstrap(statistic: Callable[[NDArray[np.int64]], float], blocks: NDArray[np.int64], times: int, seed: int) -> Any:
    """(2.5 %, 97.5 %) of a statistic of rows, over draws of whole blocks with replacement."""
    rng = np.random.default_rng(seed)
    names, where = np.unique(blocks, return_inverse=True)
    members = [np.flatnonzero(where == i) for i in range(len(names))]
    values = [
        statistic(np.concatenate([members[i] for i in rng.integers(0, len(names), len(names))])) for _ in range(times)
    ]
    return np.nanpercentile(values, [2.5, 97.5])


def substitution_classes(scores: VariantScores, fasta: str) -> tuple[Mask, Mask, NDArray[np.int64]]:
    """Of each ALT: is it a transition, is it one in a CpG, and a number for its substitution and CpG context.

    A substitution and its complement are one class; whatever is no SNV is class 99.
    """
    names = set(scores.record.tolist())
    count = len(scores.position)
    transition, in_cpg, classes = np.zeros(count, bool), np.zeros(count, bool), np.full(count, 99)
    pairs = [a + b for a in "AC" for b in "ACGT" if a != b]
    with SequenceStore.from_files([fasta], keep=names.__contains__) as store:
        for i in range(count):
            ref, alt = str(scores.reference[i]).upper(), str(scores.alternate[i]).upper()
            record = store.find(str(scores.record[i]))
            if record is None or len(ref) != 1 or len(alt) != 1 or ref not in _OTHER or alt not in _OTHER:
                continue
            at = int(scores.position[i]) - 1
            around = store.tokenizer.decode(store.read(record, max(0, at - 1), min(record.length, at + 2)))
            cpg = "CG" in around and ref in "CG"
            folded = ref + alt if ref in "AC" else _OTHER[ref] + _OTHER[alt]
            transition[i] = folded in ("AG", "CT")
            in_cpg[i] = cpg and bool(transition[i])
            classes[i] = 2 * pairs.index(folded) + int(cpg)
    return transition, in_cpg, classes


def main() -> None:
    """Score, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vcf")
    parser.add_argument("fasta")
    parser.add_argument("--model", default="dna", help="a model's folder, or a built-in one")
    parser.add_argument("--common", type=float, default=0.05, help="allele frequency from which an ALT is common")
    parser.add_argument("--rare", type=float, default=0.001, help="allele frequency up to which an ALT is rare")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--after", type=int, default=AFTER)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--bootstraps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the rows as JSON")
    parser.add_argument("--save", help="write the scores and frequencies as .npz")
    options = parser.parse_args()

    model = LanguageModel(options.model, options.device, options.batch_tokens)
    began = time.perf_counter()
    scores = score_variants(options.vcf, [options.fasta], model, options.context, options.after)
    seconds = time.perf_counter() - began
    frequency = frequencies(options.vcf)
    if len(frequency) != len(scores.llr):
        raise SystemExit(f"{options.vcf}: {len(frequency)} frequencies for {len(scores.llr)} ALTs")
    if options.save:
        np.savez(options.save, frequency=frequency, **vars(scores))
    scored = int(np.isfinite(scores.llr).sum())
    speed = f"{seconds:.1f} s ({scored / seconds:,.0f} a second)"
    print(f"{scored:,} of {len(scores.llr):,} ALTs scored in {speed} on {model.device}")

    transition, in_cpg, classes = substitution_classes(scores, options.fasta)
    known = np.isfinite(scores.llr) & np.isfinite(frequency)
    kept = known & ((frequency >= options.common) | (frequency <= options.rare)) & (frequency > 0)
    snv = classes != 99
    blocks = np.unique(scores.record, return_inverse=True)[1] * 10**9 + scores.position // BLOCK
    rows = []
    for name, chosen in (("SNV", kept & snv), ("indel and other", kept & ~snv), ("all", kept)):
        common = frequency[chosen] >= options.common
        if not common.any() or common.all():
            continue
        for rule, values in (
            ("model", scores.llr), ("model, plus strand", scores.forward), ("model, minus strand", scores.reverse),
            ("model, within classes", scores.llr), ("transition", transition), ("CpG transition", in_cpg),
        ):  # fmt: skip
            if name != "SNV" and (rule.endswith("classes") or not rule.startswith("model")):
                continue
            value, where = values[chosen].astype(np.float64), classes[chosen]
            own = rule.endswith("classes")

            def statistic(
                at: NDArray[np.int64], value: Floats = value, common: Mask = common, where: Any = where, own: bool = own
            ) -> float:
                return within_classes(value[at], common[at], where[at]) if own else auroc(value[at], common[at])

            low, high = bootstrap(statistic, blocks[chosen], options.bootstraps, options.seed)
            rows.append(
                {
                    "variants": name,
                    "score": rule,
                    "common": int(common.sum()),
                    "rare": int((~common).sum()),
                    "mean common": float(value[common].mean()),
                    "mean rare": float(value[~common].mean()),
                    "AUROC": statistic(np.arange(len(value))),
                    "from": float(low),
                    "to": float(high),
                }
            )
    print_table(rows, f"common: AF >= {options.common}; rare: AF <= {options.rare}; model {options.model}")
    write_json(options.out, "variants", [{"seconds": seconds, "scored": scored, "model": options.model}, *rows])


if __name__ == "__main__":
    main()
