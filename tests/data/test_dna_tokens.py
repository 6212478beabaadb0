"""Tokens: ids, policies, the round trip and the other strand."""

import time

import numpy as np
import pytest
from Bio.Seq import Seq
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mambagen.data.dna_tokens import IGNORED, VOCABULARY, A, C, DnaTokenizer, G, N, T

LETTERS = {"A": 7, "C": 8, "G": 9, "T": 10, "N": 11}  # the published ids


def test_ids_are_those_of_hyenadna() -> None:
    special = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
    assert special + tuple(LETTERS) == VOCABULARY
    assert DnaTokenizer().encode(b"ACGTN").tolist() == [7, 8, 9, 10, 11]
    assert DnaTokenizer().vocab_size == 12


@pytest.mark.parametrize("lower_case", ["same", "n"])
def test_every_byte_is_encoded_by_the_policy(lower_case: str) -> None:
    ids = DnaTokenizer(lower_case=lower_case).encode(bytes(range(256)))
    for byte in range(256):
        letter = chr(byte)
        if letter.upper() in "ACGTU" and letter.isascii():
            base = LETTERS[letter.upper().replace("U", "T")]
            expected = 11 if letter.islower() and lower_case == "n" else base
        elif letter.isascii() and letter.upper() in "NRYSWKMBDHV":
            expected = 11
        else:
            expected = 6  # UNK: the readers let no such byte through
        assert ids[byte] == expected, letter


def test_bytes_and_arrays_encode_alike_across_block_borders() -> None:
    letters = np.frombuffer(b"ACGTNacgtnRY", dtype=np.uint8)[
        np.random.default_rng(1).integers(0, 12, (1 << 20) + 12345)
    ]
    whole = DnaTokenizer().encode(letters)
    table = DnaTokenizer().table()
    np.testing.assert_array_equal(whole, table[letters])
    np.testing.assert_array_equal(whole, DnaTokenizer().encode(letters.tobytes()))
    np.testing.assert_array_equal(whole[::3], DnaTokenizer().encode(letters[::3]))  # not contiguous
    assert whole.flags.writeable
    assert whole.dtype == np.uint8


@given(st.text(alphabet="ACGTN", max_size=200))
def test_decoding_gives_back_what_was_encoded(sequence: str) -> None:
    tokenizer = DnaTokenizer()
    assert tokenizer.decode(tokenizer.encode(sequence.encode())) == sequence


def test_decoding_names_special_tokens_and_refuses_other_numbers() -> None:
    assert DnaTokenizer().decode([0, 7, 4]) == "[CLS]A[PAD]"
    with pytest.raises(ValueError, match="0 to 11"):
        DnaTokenizer().decode([12])
    with pytest.raises(ValueError, match="0 to 11"):
        DnaTokenizer().decode([-1])


@given(st.text(alphabet="ACGTN", max_size=200))
def test_reverse_complement_agrees_with_biopython(sequence: str) -> None:
    tokenizer = DnaTokenizer()
    other = tokenizer.reverse_complement(tokenizer.encode(sequence.encode()))
    assert tokenizer.decode(other) == str(Seq(sequence).reverse_complement())


def test_reverse_complement_works_along_the_last_axis_and_leaves_special_tokens() -> None:
    ids = np.array([[7, 8, 4], [9, 10, 11]], dtype=np.uint8)
    assert DnaTokenizer().reverse_complement(ids).tolist() == [[4, 9, 10], [11, 7, 8]]


def test_targets_leave_out_n_and_special_tokens() -> None:
    ids = np.array([A, C, N, G, T, 4, 0, 6], dtype=np.uint8)
    ignored, predicted = DnaTokenizer().targets(ids), DnaTokenizer(n="predict").targets(ids)
    assert ignored.dtype == np.int64
    assert ignored.tolist() == [7, 8, IGNORED, 9, 10, IGNORED, IGNORED, IGNORED]
    assert predicted.tolist() == [7, 8, 11, 9, 10, IGNORED, IGNORED, IGNORED]


def test_the_policy_survives_a_checkpoint_and_unknown_policies_do_not() -> None:
    tokenizer = DnaTokenizer(lower_case="n", n="predict")
    assert DnaTokenizer.model_validate_json(tokenizer.model_dump_json()) == tokenizer
    assert DnaTokenizer.model_validate(tokenizer.model_dump(mode="json")) == tokenizer
    with pytest.raises(ValidationError):
        DnaTokenizer(lower_case="upper")
    with pytest.raises(ValidationError):
        DnaTokenizer.model_validate({"caps": 1})
    with pytest.raises(ValidationError, match="vocabulary"):
        DnaTokenizer(vocabulary=("A", "C", "G", "T"))


def test_encoding_runs_at_200_megabases_a_second() -> None:
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)[np.random.default_rng(0).integers(0, 4, 20_000_000)]
    tokenizer = DnaTokenizer()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        tokenizer.encode(letters)
        seconds.append(time.perf_counter() - start)
    assert len(letters) / min(seconds) >= 200e6


@pytest.mark.parametrize("n", ["ignore", "predict"])
def test_targets_of_a_byte_are_those_of_eight(n: str) -> None:
    tokenizer = DnaTokenizer(n=n)  # type: ignore[arg-type]
    ids = np.random.default_rng(0).integers(0, 12, (5, 1001)).astype(np.uint8)
    for part in (ids, ids[:, 1:]):
        short = tokenizer.targets(part, np.int8)
        assert short.dtype == np.int8
        assert short.flags.writeable
        assert np.array_equal(short, tokenizer.targets(part))
