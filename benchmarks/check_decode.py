"""Holds the CUDA decoder to float64 on this GPU, names the first wrong stage where it is wrong, then times it.

    python -m benchmarks.check_decode                # all groups, each in a process of its own with a time limit
    python -m benchmarks.check_decode correct-small  # one group here
    python -m benchmarks.check_decode all-but profile

Needs torch, cuda-bindings and a GPU of compute capability 9.0 or newer; nothing of the models.
"""

import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mambagen.kernels.mamba_decode import LayerWeights, Sampling, StackWeights
from mambagen.kernels.mamba_decode.cuda import CudaDecoder, Layout, _active_clusters, chip
from mambagen.kernels.mamba_decode.reference import GraphDecoder, ReferenceDecoder, draw_tokens, rms_norm

WATCH = {"WATCHDOG": 3000}  # milliseconds after which a wait is given up
SECONDS = 170  # of a group
PARTS = (
    "wait residual", "in_proj", "norm, conv, gate", "sync", "x_proj, sends", "wait mixed", "sum mixed",
    "scan", "out_proj, sends", "fetch weights", "new residual", "outside layers",
)  # fmt: skip


def draw_weights(width: int, layers: int, vocabulary: int = 16, rank: int | None = None, taps: int = 4) -> StackWeights:
    """Weights of the size that a trained model has, none of them at a one or a zero which would hide its use."""
    make = torch.Generator().manual_seed(0)
    inner, states, rank = 2 * width, 16, rank or math.ceil(width / 16)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=make) * scale + mean).cuda()

    def layer() -> LayerWeights:
        return LayerWeights(
            normal(width, scale=0.2, mean=1),
            normal(2 * inner, width, scale=width**-0.5),
            normal(inner, taps, scale=taps**-0.5),
            normal(inner, scale=0.1),
            normal(rank + 2 * states, inner, scale=inner**-0.5),
            normal(inner, rank, scale=rank**-0.5),
            normal(inner, mean=-3),
            torch.arange(1, states + 1).float().log().cuda() + normal(inner, states, scale=0.2),
            normal(inner, scale=0.2, mean=1),
            normal(width, inner, scale=(inner * layers) ** -0.5),
        )

    embedding, head = normal(vocabulary, width, scale=0.5), normal(vocabulary, width, scale=width**-0.5)
    return StackWeights(embedding, [layer() for _ in range(layers)], normal(width, scale=0.2, mean=1), head, 1e-5)


def to_double(weights: StackWeights) -> StackWeights:
    layers = [LayerWeights(*(v.double() for v in layer)) for layer in weights.layers]
    return StackWeights(
        weights.embedding.double(), layers, weights.norm_f.double(), weights.head.double(), weights.epsilon
    )


def rounded(weights: StackWeights) -> StackWeights:
    """What the kernel's bfloat16 weights stand for: the norms folded in, four projections rounded."""

    def low(v: Tensor) -> Tensor:
        return v.bfloat16().float()

    layers = [
        w._replace(
            norm=torch.ones_like(w.norm),
            in_proj=low(w.in_proj * w.norm),
            x_proj=low(w.x_proj),
            out_proj=low(w.out_proj),
        )
        for w in weights.layers
    ]
    ones = torch.ones_like(weights.norm_f)
    return weights._replace(layers=layers, norm_f=ones, head=low(weights.head * weights.norm_f))


def error(found: Tensor, exact: Tensor) -> float:
    """The worst difference over the largest value; NaN counts as inf."""
    if not torch.isfinite(found).all():
        return math.inf
    return ((found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1e-30)).item()


# ---- correct


def check(width: int, layers: int, batch: int, steps: int, precision: str, label: str = "", **options: object) -> bool:
    """Logits of every step, the state after the last, and drawn tokens against float64; a line of results."""
    model = {k: options.pop(k) for k in ("vocabulary", "rank", "taps") if k in options}
    weights = draw_weights(width, layers, **model)  # type: ignore[arg-type]
    exact_weights = to_double(rounded(weights) if precision == "bfloat16" else weights)
    vocabulary = len(weights.head)
    tokens = torch.randint(0, vocabulary, (batch, steps), generator=torch.Generator().manual_seed(1)).cuda()
    start = time.perf_counter()
    decoder = CudaDecoder(weights, batch, precision, debug=WATCH, **options)  # type: ignore[arg-type]
    exact = ReferenceDecoder(exact_weights, batch)
    found = decoder.read(tokens)
    torch.cuda.synchronize()
    expected = exact.read(tokens)
    logits = error(found, expected)
    conv, ssm = decoder.state()
    exact_conv, exact_ssm = exact.state()
    states = max(error(a, b) for a, b in zip([*conv, *ssm], [*exact_conv, *exact_ssm], strict=True))
    # draws: the tokens must be those that the definition draws from the kernel's own logits
    agree = []
    bias = torch.zeros(vocabulary, device="cuda")
    bias[vocabulary // 2] = -math.inf
    streams = torch.arange(batch, device="cuda") + 3
    for sampling in (Sampling(0), Sampling(1, seed=7), Sampling(0.8, top_k=5, seed=1 << 40), Sampling(1.3, top_p=0.7)):
        first = decoder.logits.clone()
        saved = decoder.state()
        drawn = decoder.draw(20, sampling, bias, (1 << 33) + 5, streams)
        decoder.load_state(*saved)
        after = decoder.read(drawn)
        before = torch.cat([first[:, None], after[:, :-1]], 1)
        for i in range(20):
            again = draw_tokens(
                (before[:, i] + bias).double(), sampling, torch.full_like(streams, (1 << 33) + 5 + i), streams
            )
            agree.append((again == drawn[:, i]).float().mean().item())
    share = sum(agree) / len(agree)
    good = logits < 1e-4 and states < 1e-3 and share > 0.995
    layout = decoder.layout
    print(
        f"{'ok ' if good else 'BAD'} width {width} layers {layers} batch {batch} {precision} {label}"
        f" cluster {layout.cluster} x {decoder.clusters}, streams {layout.streams}, slots {layout.slots}"
        f"{' resident' if layout.resident else ''}: logits {logits:.1e} states {states:.1e} draws {share:.4f}"
        f" ({time.perf_counter() - start:.1f} s)",
        flush=True,
    )
    if not good:
        per_step = [f"{error(found[:, i], expected[:, i]):.1e}" for i in range(min(steps, 6))]
        print("    logits by step:", *per_step)
        find_stage(weights, exact_weights, tokens[:, :3], precision, options)
    return good


def find_stage(
    weights: StackWeights, exact: StackWeights, tokens: Tensor, precision: str, options: Mapping[str, object]
) -> None:
    """Prints the errors of the first steps' stages, and where the first wrong one differs."""
    decoder = CudaDecoder(weights, len(tokens), precision, debug={**WATCH, "DUMP": 1}, **options)  # type: ignore[arg-type]
    decoder.read(tokens)
    torch.cuda.synchronize()
    found, expected = decoder.stages(), exact_stages(exact, tokens)
    rank, padded = weights.layers[0].dt_proj.shape[1], decoder.layout.rank
    mixed = found["mixed"]
    found["mixed"] = torch.cat([mixed[..., :rank], mixed[..., padded:]], -1)
    shown = 0
    for step in range(tokens.shape[1]):
        for layer in range(len(weights.layers)):
            for name, values in expected.items():
                wrong = error(found[name][step, layer], values[step, layer])
                if wrong > 1e-4 and shown < 12:
                    a, b = found[name][step, layer].double(), values[step, layer].double()
                    bad = ~((a - b).abs() <= 1e-4 * b.abs().max())
                    rows, columns = bad.any(1).nonzero().flatten(), bad.any(0).nonzero().flatten()
                    print(
                        f"    step {step} layer {layer} {name}: {wrong:.1e}; {int(bad.sum())} of {bad.numel()} wrong,"
                        f" streams {rows[:8].tolist()}, places {columns[:12].tolist()} ... {columns[-1].item()},"
                        f" found {a[bad][:4].tolist()}, expected {b[bad][:4].tolist()}",
                        flush=True,
                    )
                    shown += 1


@torch.no_grad()
def exact_stages(weights: StackWeights, tokens: Tensor) -> dict[str, Tensor]:
    """What `CudaDecoder.stages` should hold, in the order in which a layer computes it."""
    batch = len(tokens)
    state = ReferenceDecoder(weights, batch)
    names = ("residual", "x", "gate", "convolved", "mixed", "dt", "y")
    everything: dict[str, list[list[Tensor]]] = {name: [] for name in names}
    for token in tokens.unbind(1):
        x = weights.embedding[token]
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for w, conv, ssm in zip(weights.layers, state._conv, state._ssm, strict=True):
            rows["residual"].append(x)
            u, z = F.linear(rms_norm(x, w.norm, weights.epsilon), w.in_proj).chunk(2, -1)
            rows["x"].append(u)
            window = torch.cat([conv, u[:, None]], 1)
            u = F.silu((window * w.conv_weight.T).sum(1) + w.conv_bias)
            conv.copy_(window[:, 1:])
            mixed = F.linear(u, w.x_proj)
            low, B, C = mixed.split([w.dt_proj.shape[1], 16, 16], -1)
            dt = F.softplus(F.linear(low, w.dt_proj) + w.dt_bias)
            ssm.copy_(torch.exp(dt[..., None] * -torch.exp(w.A_log)) * ssm + (dt * u)[..., None] * B[:, None])
            y = ((ssm * C[:, None]).sum(-1) + w.D * u) * F.silu(z)
            for name, v in (("gate", F.silu(z)), ("convolved", u), ("mixed", mixed), ("dt", dt), ("y", y)):
                rows[name].append(v)
            x = x + F.linear(y, w.out_proj)
        for name in names:
            everything[name].append(rows[name])
    return {name: torch.stack([torch.stack(v) for v in values]) for name, values in everything.items()}


def correct_small() -> None:
    for precision in ("float32", "bfloat16"):
        check(64, 1, 1, 3, precision, cluster=1, streams=1)
        check(64, 2, 1, 40, precision, cluster=2, streams=1)
        check(64, 8, 1, 40, precision)
        check(64, 8, 3, 40, precision)
    check(96, 3, 5, 40, "float32", streams=4)
    check(72, 2, 3, 40, "float32", "narrow", rank=7, taps=3)
    check(128, 4, 16, 40, "float32", streams=8)
    check(64, 2, 4, 40, "float32", "divided head", vocabulary=300)


def correct_large() -> None:
    check(256, 12, 1, 60, "float32")
    check(256, 12, 1, 300, "bfloat16")
    for batch in (3, 16, 17, 128):
        check(256, 12, batch, 60, "bfloat16")
    check(256, 2, 40, 60, "bfloat16", streams=16)
    check(512, 3, 9, 40, "bfloat16")
    check(384, 3, 2, 40, "float32")
    check(256, 2, 2, 40, "bfloat16", "divided head", vocabulary=1024)


def correct_sixteen() -> None:
    """Clusters of 16, which not every GPU has."""
    for width, layers, batch in ((256, 12, 1), (256, 12, 8), (512, 2, 1), (128, 12, 1)):
        try:
            if _active_clusters(0, 16, 200 << 10) < 1:
                print("clusters of 16 cannot run here")
                return
            check(width, layers, batch, 40, "bfloat16", cluster=16)
        except RuntimeError as problem:
            print(f"    cluster 16: {problem}", flush=True)


def few() -> None:
    """As little as there is to see of clusters, bulk copies and both precisions: to run under compute-sanitizer."""
    WATCH.clear()  # there every wait is long
    check(64, 1, 1, 3, "float32", cluster=2, streams=1)
    check(64, 2, 3, 4, "bfloat16")
    check(256, 2, 3, 3, "bfloat16")


def repeatable() -> None:
    """The same bits from the same call, many times and in any company: races show here."""
    weights = draw_weights(256, 12)
    bias, steps = torch.zeros(16, device="cuda"), 2000
    first: Tensor | None = None
    for trial in range(6):
        batch = (1, 1, 4, 16, 40, 128)[trial]
        decoder = CudaDecoder(weights, batch)
        decoder.read(torch.full((batch, 1), 7, device="cuda"))
        tokens = decoder.draw(steps, Sampling(), bias, 1, torch.arange(batch, device="cuda"))
        first = tokens[0] if first is None else first
        same = torch.equal(tokens[0], first)
        print(f"{'ok ' if same else 'BAD'} batch {batch}: stream 0 the same for {steps} tokens: {same}", flush=True)


# ---- fast


def rate(decoder: CudaDecoder | GraphDecoder, batch: int, steps: int) -> float:
    """Microseconds a step, the median of five runs."""
    bias, streams = torch.zeros(16, device="cuda"), torch.arange(batch, device="cuda")
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        decoder.draw(steps, Sampling(), bias, 0, streams)
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end) / steps)
    return sorted(times[1:])[2]


def timing() -> None:
    for width, layers in ((256, 12), (64, 8), (512, 24)):
        weights = draw_weights(width, layers)
        for batch in (1, 4, 7, 8, 16, 32, 64, 128, 256):
            options: list[dict[str, int]] = [{}]
            if batch == 1:
                options += [{"cluster": c} for c in (2, 4, 8, 16)] if width < 512 else [{"cluster": 16}]
            elif batch >= 64:
                options += [{"streams": s} for s in (4, 8, 16)] if width == 256 else []
            seen = set()
            for option in options:
                try:
                    decoder = CudaDecoder(weights, batch, **option)  # type: ignore[arg-type]
                    layout = decoder.layout
                    if layout in seen:
                        continue
                    seen.add(layout)
                    us = rate(decoder, batch, 1000)
                except (RuntimeError, ValueError) as problem:
                    print(f"    width {width} batch {batch} {option}: {str(problem)[:150]}", flush=True)
                    continue
                print(
                    f"width {width} x {layers} batch {batch:4d} cluster {layout.cluster:2d} x {decoder.clusters:3d}"
                    f" streams {layout.streams:2d} slots {layout.slots}{' resident' if layout.resident else ''}:"
                    f" {us:8.2f} us a step, {1e6 * batch / us:12,.0f} tokens/s;"
                    f" {layout.block_bytes / us / 1e3:6.1f} GB/s a block",
                    flush=True,
                )
    weights = draw_weights(256, 12)
    for precision in ("float32",):
        us = rate(CudaDecoder(weights, 1, precision), 1, 1000)
        print(f"width 256 batch 1 {precision}: {us:.2f} us a step, {1e6 / us:,.0f} tokens/s")
    for batch in (1, 128):
        us = rate(GraphDecoder(weights, batch), batch, 200)
        print(f"CUDA graph of plain operations, batch {batch}: {us:.1f} us a step, {1e6 * batch / us:,.0f} tokens/s")
    decoder = CudaDecoder(weights, 1)
    token = torch.full((1, 1), 7, device="cuda")
    decoder.read(token)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(500):
        decoder.read(token)
    torch.cuda.synchronize()
    print(f"one launch a token: {(time.perf_counter() - start) / 500 * 1e6:.1f} us a step")


def profile() -> None:
    """Cycles of every part of a layer, for each warp of the first block."""
    steps = 300
    for width, layers, batch, options in (
        (256, 12, 1, {}), (256, 12, 1, {"cluster": 16}), (256, 12, 128, {}), (64, 8, 1, {}), (64, 8, 1, {"cluster": 1}),
    ):  # fmt: skip
        try:
            weights = draw_weights(width, layers)
            decoder = CudaDecoder(weights, batch, debug={"PROFILE": 1}, **options)  # type: ignore[arg-type]
            us = rate(decoder, batch, steps)
            spent = decoder.profile().cpu() / steps
            spent[:, :11] /= layers
            print(f"\nwidth {width} batch {batch} {options or ''}: {us:.2f} us a step; cycles a layer, by warp")
            for part, name in enumerate(PARTS):
                print(f"  {name:18s}", *(f"{v:7.0f}" for v in spent[:, part].tolist()))
            print(f"  {'a layer':18s}", *(f"{v:7.0f}" for v in spent[:, :11].sum(1).tolist()), flush=True)
        except (RuntimeError, ValueError) as problem:
            print(f"    {width} {batch} {options}: {str(problem)[:150]}", flush=True)


GROUPS: dict[str, Callable[[], None]] = {
    "correct-small": correct_small,
    "correct-large": correct_large,
    "correct-sixteen": correct_sixteen,
    "few": few,
    "repeatable": repeatable,
    "timing": timing,
    "profile": profile,
}


def facts() -> None:
    limit, processors = chip(torch.device("cuda", 0))
    print(torch.cuda.get_device_name(), f"{processors} multiprocessors, {limit} bytes of shared memory a block")
    for cluster in (1, 2, 4, 8, 16):
        try:
            print(f"  clusters of {cluster} side by side: {_active_clusters(0, cluster, 200 << 10)}")
        except RuntimeError as problem:
            print(f"  clusters of {cluster}: {problem}")
    layout = Layout.of(draw_weights(256, 12), 1, 1, limit)
    print(f"  12 x 256: {layout.block_bytes} bytes of weights a block and token, {layout.slots} slots", flush=True)


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    names = sys.argv[1:]
    if len(names) == 1 and names[0] in GROUPS:
        GROUPS[names[0]]()
        return
    wanted = [name for name in GROUPS if name not in names] if names[:1] == ["all-but"] else names or list(GROUPS)
    subprocess.run([sys.executable, "-c", "from benchmarks.check_decode import facts; facts()"], timeout=SECONDS)
    for name in wanted:
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        try:
            done = subprocess.run([sys.executable, "-m", "benchmarks.check_decode", name], timeout=SECONDS)
            result = "done" if done.returncode == 0 else f"ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {SECONDS} s"
        print(f"== {name}: {result} ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
