"""`mambagen doctor`: what it finds here, and that a wrong kernel does not pass."""

import json

import pytest
import torch

from mambagen import cli
from mambagen.kernels.dispatch import backend_module
from mambagen.pipelines import doctor


def test_the_kernels_here_pass_and_versions_are_those_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--shapes", "2x33x32", "--shapes", "1x1x32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["failed"] == 0
    on_cpu = [check for check in report["checks"] if check["device"] == "cpu"]
    assert {(check["op"], check["shape"]) for check in on_cpu if check["backend"] == "cpu"} >= {
        (op, shape) for op in ("selective_scan", "causal_conv1d") for shape in ("2x33x32", "1x1x32")
    }
    for check in on_cpu:
        assert check["result"] == "PASS"
        assert 0 < check["forward_error"] < 1e-5
        assert 0 < check["backward_error"] < 1e-5
    if not torch.cuda.is_available():
        assert [each["device"] for each in report["backends"] if each["backend"] == "cuda"] == [None, None]


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("forward", lambda found: (found[0] * 1.001, *found[1:]), "FAIL"),
        ("backward", lambda found: (found[0], found[1], -found[2], *found[3:]), "the gradient of A is the worst"),
        ("backward", lambda found: (found[0] * torch.nan, *found[1:]), "the gradient of x is the worst"),
        ("forward", lambda found: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_kernel_that_is_wrong_fails_with_exit_1(name, spoil, told, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    module = backend_module("selective_scan", "cpu")
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: spoil(right(*arguments)))
    assert cli.run(["doctor", "--shapes", "1x9x32"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " FAIL" in line]
    assert told in line
    assert line.startswith("selective_scan")


@pytest.mark.parametrize("arguments", [["--shapes", "2x3"], ["--shapes", "0x1x1"], ["--state", "300"]])
def test_impossible_shapes_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_relative_error_is_the_largest_difference_over_the_largest_value() -> None:
    exact = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)
    assert doctor.relative_error(exact.float() + torch.tensor([0.0, 0.0, 0.5]), exact) == pytest.approx(0.125)
    assert doctor.relative_error(torch.tensor([1.0, torch.inf, 2.0]), exact) == float("inf")
