"""The tools for DNA give on a GPU what they give on a CPU."""

import numpy as np
import pytest
import torch

from mambagen.data.dna_tokens import DnaTokenizer
from mambagen.data.sequence_store import SequenceStore
from mambagen.models import MAMBA_SIZES
from mambagen.pipelines.embed import Embedder
from mambagen.pipelines.generate_dna import Prompt, generate_dna
from mambagen.pipelines.likelihood import LanguageModel, Span
from mambagen.pipelines.variant_likelihoods import Site, VariantScorer
from tests.data.helpers import random_dna
from tests.pipelines.dna_models import small_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DNA = random_dna(5000, 1, b"ACGTN").encode()
SIZE = MAMBA_SIZES["250k"]


def test_likelihoods_in_chunks_and_batches() -> None:
    """By the built-in model: one of random weights, with log-probabilities down to -23, makes 1e-3 of rounding."""
    expected = LanguageModel("dna", "cpu").score(DNA, both_strands=True)
    for batch_tokens in (700, 1 << 16):
        model = LanguageModel("dna", "cuda", batch_tokens)
        np.testing.assert_allclose(model.score(DNA, both_strands=True), expected, rtol=0, atol=1e-4)
        with SequenceStore(DnaTokenizer()) as store:
            record = store.put("r", store.tokenizer.encode(DNA))
            spans = [Span(record, at, at + 100 + at % 77) for at in range(0, 4800, 100)]
            together = [scores for _, _, scores in model.spans(store, spans)]
            alone = [next(model.spans(store, [span]))[2] for span in spans]
        np.testing.assert_allclose(np.concatenate(together), np.concatenate(alone), rtol=0, atol=1e-5)
    rough = LanguageModel("dna", "cuda", 700, "bf16").score(DNA, both_strands=True)
    assert np.nanmean(np.abs(rough - expected)) < 0.1


def test_variants_and_vectors() -> None:
    tokenizer = DnaTokenizer()
    found = []
    for device in ("cpu", "cuda"):
        with SequenceStore(tokenizer) as store:
            record = store.put("r", tokenizer.encode(DNA))
            sites = [Site(record, at, at + 1, (tokenizer.encode(b"ACG"), tokenizer.encode(b"T"))) for at in
                     range(5, 5000, 31)]  # fmt: skip
            scorer = VariantScorer(LanguageModel(small_model(0, SIZE), device), 256, 64)
            found.append(np.array(scorer.score(store, sites)))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=2e-2)  # sums of a hundred
    vectors = [Embedder(small_model(0, SIZE), None, device).embed(DNA) for device in ("cpu", "cuda")]
    np.testing.assert_allclose(vectors[1], vectors[0], rtol=0, atol=1e-3)


def test_generated_sequences_do_not_depend_on_the_batch() -> None:
    prompts = [Prompt("p", DNA[:300])]
    made = [
        [
            new.sequence
            for new in generate_dna(small_model(0, SIZE), prompts, 200, 6, seed=1, device="cuda", batch=batch)
        ]
        for batch in (1, 4, 6)
    ]
    assert made[0] == made[1] == made[2]
    assert set("".join(made[0])) <= set("ACGT")
