"""S4D and S4 as modules: first values, learning rates, stability; the contract itself is in test_mixer_contract.py."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from mambagen.models.hippo import dplr_legs, hippo_legs, s4d_spectrum
from mambagen.models.optimiser_groups import parameter_groups
from mambagen.models.s4_mixer import S4, S4Config
from mambagen.models.s4d_mixer import S4D, S4DConfig, S4DMixer


def test_legs_is_the_matrix_of_its_definition():
    A, B = hippo_legs(3)
    np.testing.assert_allclose(A, [[-1, 0, 0], [-(3**0.5), -2, 0], [-(5**0.5), -(15**0.5), -3]])
    np.testing.assert_allclose(B, [1, 3**0.5, 5**0.5])
    np.testing.assert_allclose(A, np.tril(A))  # its eigenvalues are those on the diagonal


def test_diagonal_plus_low_rank_is_legs_again():
    A, B = hippo_legs(16)
    L, P, b, V = dplr_legs(8)
    whole_V, whole_L, whole_P = np.hstack([V, V.conj()]), np.r_[L, L.conj()], np.r_[P, P.conj()]
    np.testing.assert_allclose(
        whole_V @ (np.diag(whole_L) - np.outer(whole_P, whole_P.conj())) @ whole_V.conj().T, A, atol=1e-12
    )
    np.testing.assert_allclose(2 * (V @ b).real, B, atol=1e-12)


def test_spectra_are_the_papers():
    np.testing.assert_allclose(s4d_spectrum("lin", 3), [-0.5, -0.5 + 1j * np.pi, -0.5 + 2j * np.pi])
    np.testing.assert_allclose(s4d_spectrum("inv", 2), [-0.5 + 12j / np.pi, -0.5 + 4j / 3 / np.pi])
    np.testing.assert_allclose(s4d_spectrum("real", 3), [-1, -2, -3])
    A, _ = hippo_legs(64)
    P = np.sqrt(np.arange(64) + 0.5)
    exact = np.linalg.eigvals(A + np.outer(P, P))
    exact = exact[exact.imag > 0]
    np.testing.assert_allclose(s4d_spectrum("legs", 32), exact[np.argsort(exact.imag)], atol=1e-10)
    # S4D-Inv was made to follow it: the largest frequencies agree within some per cent
    assert abs(s4d_spectrum("inv", 32).imag.max() / exact.imag.max() - 1) < 0.05
    with pytest.raises(ValueError, match="lin, inv, legs, real"):
        s4d_spectrum("fou", 2)


@pytest.mark.parametrize("init", ["lin", "inv", "legs", "real"])
def test_a_new_system_has_the_spectrum_and_log_uniform_steps(init):
    torch.manual_seed(0)
    dt, A, C, D = S4D(S4DConfig(d_model=512, d_state=8, init=init, dt_min=1e-2, dt_max=1.0)).system()
    np.testing.assert_allclose(A[17].detach().numpy(), s4d_spectrum(init, 8), rtol=1e-6)
    assert stats.kstest(dt.detach().numpy(), stats.loguniform(1e-2, 1.0).cdf).pvalue > 1e-3
    assert C.abs().square().mean().item() == pytest.approx(1.0, abs=0.1)
    assert A.is_complex() == C.is_complex() == (init != "real")
    assert torch.equal(D, torch.ones(512))


def test_no_step_of_an_optimiser_makes_a_system_grow():
    ssm = S4D(S4DConfig(d_model=4, d_state=3))
    with torch.no_grad():
        for move in (-1e3, 1e3):
            ssm.log_A_real.fill_(move if move < 0 else 50.0)
            assert (ssm.system()[1].real <= -1e-4).all()
        ssm.log_A_real.fill_(-1e3)
    y, _ = ssm(torch.ones(1, 4096, 4))
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("n_ssm", [1, 2, "channels"])
def test_systems_are_shared_by_neighbouring_channels(n_ssm):
    ssm = S4D(S4DConfig(d_model=4, d_state=3, n_ssm=n_ssm))
    y, _ = ssm(torch.randn(1, 30, 1).expand(1, 30, 4))
    same = [torch.allclose(y[..., a], y[..., b], atol=1e-6) for a, b in ((0, 1), (1, 2), (2, 3))]
    assert same == {1: [True] * 3, 2: [True, False, True], "channels": [False] * 3}[n_ssm]


def test_steps_and_spectrum_learn_slowly_and_nothing_of_the_system_decays():
    mixer = S4DMixer(S4DConfig(d_model=4, d_state=3, lr_scale=0.25))
    of = {name: group for group in parameter_groups(mixer, 0.1) for name in group["names"]}
    for name in ("log_dt", "log_A_real", "A_imag"):
        assert (of[f"ssm.{name}"]["lr_scale"], of[f"ssm.{name}"]["weight_decay"]) == (0.25, 0.0)
    for name in ("C", "D"):
        assert (of[f"ssm.{name}"]["lr_scale"], of[f"ssm.{name}"]["weight_decay"]) == (1.0, 0.0)
    assert of["out_proj.weight"]["weight_decay"] == 0.1


def test_a_model_cast_to_bfloat16_computes_its_system_in_float32():
    torch.manual_seed(0)
    mixer = S4DMixer(S4DConfig(d_model=8, d_state=4))
    x = torch.randn(2, 50, 8)
    whole, _ = mixer(x)
    low, state = mixer.bfloat16()(x.bfloat16(), mixer.allocate_state(2))
    assert (low.dtype, state.real.dtype) == (torch.bfloat16, torch.float32)
    assert (low.float() - whole).abs().max() < 0.05 * whole.abs().max()


def test_impossible_configs_are_refused():
    for change, message in (
        ({"n_ssm": 3}, "n_ssm 3 does not divide d_model 4"),
        ({"dt_min": 1.0}, "larger than dt_max"),
        ({"init": "fou"}, "init"),
        ({"width": 1}, "width"),
    ):
        with pytest.raises(ValidationError, match=message):
            S4DConfig(d_model=4, **change)


def test_s4_begins_as_hippo_legs():
    dt, Lambda, P, B, C, D = (v.detach().numpy() for v in S4(S4Config(d_model=3, d_state=8)).system())
    for ours, exact in zip((Lambda, P, B), dplr_legs(8)[:3], strict=True):
        np.testing.assert_allclose(ours, np.tile(exact, (3, 1)), rtol=1e-5, atol=1e-5)
    assert (dt > 0).all()
    assert (D == 1).all()
    assert C.shape == (3, 8)


def test_s4_cannot_be_trained_into_growing():
    torch.manual_seed(0)
    ssm = S4(S4Config(d_model=4, d_state=8))
    with torch.no_grad():
        ssm.log_Lambda_real.fill_(-1e3)
        for parameter in (ssm.P, ssm.Lambda_imag, ssm.log_dt):
            parameter.add_(3 * torch.randn_like(parameter))
    _, state = ssm(torch.randn(1, 64, 4), ssm.allocate_state(1))
    size = state.complex.abs().square().sum((0, 2))
    for _ in range(3):
        _, state = ssm(torch.zeros(1, 500, 4), state)
        after = state.complex.abs().square().sum((0, 2))
        assert (after <= size * 1.001).all()
        size = after


def test_s4_gives_its_rate_to_all_but_the_readout():
    of = {name: group for group in parameter_groups(S4(S4Config(d_model=4, d_state=3)), 0.1) for name in group["names"]}
    slow = {name for name, group in of.items() if group["lr_scale"] == 0.1}
    assert slow == {"log_dt", "log_Lambda_real", "Lambda_imag", "P", "B"}
    assert {group["weight_decay"] for group in of.values()} == {0.0}
