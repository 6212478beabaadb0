"""Classes of the audio U-Net: how their vectors begin, where they are heard, and that a short training heeds them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambagen.models.audio_unet import MIDDLE, AudioUNet, AudioUNetConfig

LENGTH, ONSETS = 256, 128  # of clips; from one class's onsets to the other's


def vectors_of(model: AudioUNet) -> list[Tensor]:
    """(classes + 1, width) of each place."""
    assert model.class_embedding is not None
    return list(model.class_embedding.weight.detach().split(model.config.class_sizes, 1))


def test_vectors_begin_as_large_as_the_stream_is_there() -> None:
    model = AudioUNet(AudioUNetConfig(classes=10), seed=0)
    assert [v.shape for v in vectors_of(model)] == [(11, n) for n in (64, 128, 256, 64, 128)]
    for vectors, deviation in zip(vectors_of(model), (1.0, 0.5, 0.5, 1.0, 0.5), strict=True):
        assert vectors.std() == pytest.approx(deviation, rel=0.1)
        distances = torch.pdist(vectors) / vectors.shape[1] ** 0.5
        assert distances.min() > deviation
    seen: list[float] = []
    for stage in (*model.down, model.centre, *model.up):
        stage[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].square().mean().sqrt().item()))
    with torch.no_grad():
        model(torch.randint(90, 166, (1, 1024), generator=torch.Generator().manual_seed(0)))
    for size, vectors in zip(seen, [vectors_of(model)[place] for place in (0, 1, 2, 4, 3)], strict=True):
        assert 0.15 * size < vectors.std() < size  # the stream has the vectors in it


def test_vectors_are_not_decayed_and_the_model_without_classes_has_none() -> None:
    groups = AudioUNet(AudioUNetConfig(d_model=8, n_layer=1, classes=2)).parameter_groups(0.1)
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays["class_embedding.weight"] == 0
    assert decays["embedding.weight"] == 0.1
    plain = AudioUNet(AudioUNetConfig(d_model=8, n_layer=1), seed=0)
    assert set(plain.state_dict()) == set(decays) - {"class_embedding.weight"}


@torch.no_grad()
def test_every_vector_is_heard_after_its_place_and_by_its_own_rows_only() -> None:
    model = AudioUNet(AudioUNetConfig(d_model=8, n_layer=1, classes=2), seed=0).eval()
    tokens = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
    before, _ = model(tokens, None, torch.tensor([0, 1]))
    # Level 1's frames are full at 3, 7, ... and heard from 4, 8, ... on; the centre's first, full at 15, is read by the
    # frame of level 1 that is full at 19.
    firsts = (0, 4, 20, 0, 4)
    for vectors, first in zip(vectors_of(model), firsts, strict=True):
        was = vectors[1].clone()
        vectors[1] += 0.5
        after, _ = model(tokens, None, torch.tensor([0, 1]))
        vectors[1] = was
        assert torch.equal(after[0], before[0])
        changed = (after[1] - before[1]).abs().amax(-1) > 1e-6
        assert int(changed.int().argmax()) == first
        assert changed[first:].all()


def draw_clips(classes: Tensor, generator: torch.Generator) -> Tensor:
    """(clips, LENGTH) of faint noise with a burst, the first class's in the first half, the second's in the second."""
    shape = (len(classes), LENGTH)
    faint = torch.randint(124, 133, shape, generator=generator)
    loud = torch.randint(64, 193, shape, generator=generator)
    onset = torch.randint(ONSETS // 4, ONSETS // 2, shape[:1], generator=generator) + classes * ONSETS
    since = torch.arange(LENGTH) - onset[:, None]
    return torch.where((since >= 0) & (since < ONSETS // 4), loud, faint)


def nats(model: AudioUNet, clips: Tensor, classes: Tensor) -> Tensor:
    """(clips,): of each clip as one of a class."""
    logits, _ = model(F.pad(clips, (1, -1), value=MIDDLE), None, classes)
    return F.cross_entropy(logits.transpose(1, 2), clips, reduction="none").sum(1)


def test_a_short_training_heeds_the_class() -> None:
    """The class tells one bit, and nothing else does before the onset. Where it has one vector, of deviation 0.1 beside

    the tokens' embeddings and decayed, the right class is worth 0.4 nats a clip after the same training; here 150.
    """
    steps, count, generator = 300, 8, torch.Generator().manual_seed(3)
    model = AudioUNet(AudioUNetConfig(d_model=16, n_layer=1, d_state=8, classes=2), seed=3)
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in model.parameter_groups(0.1)]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    classes = torch.arange(count) % 2
    for i in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 6e-3 * min(1, (i + 1) / 20) * (1 - i / steps)
        clips = draw_clips(classes, generator)
        dropped = torch.rand(count, generator=generator) < 0.1
        loss = nats(model, clips, classes.masked_fill(dropped, model.config.classes)).mean() / LENGTH
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    classes = torch.arange(32) % 2
    clips = draw_clips(classes, generator)
    with torch.no_grad():
        right, wrong = nats(model, clips, classes), nats(model, clips, 1 - classes)
    assert right.mean() < 2.8 * LENGTH  # 2.53 where the onset is known; 5.5 before training
    for one in (0, 1):
        assert (wrong - right)[classes == one].mean() > 2
