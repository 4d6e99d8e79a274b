"""Averaging over turned crops: pictures turn as in training, answers are turned back."""

from threading import Barrier

import numpy as np
import pytest
import torch

from engine.turns import average_over_turns
from frames.transforms import Augmentation, augment_image, augment_joints
from model import StageOutput
from predict import HandPoseEstimator
from utils import UserError

SIZE = 64


@pytest.fixture(autouse=True)
def cores(monkeypatch):
    """Let one crop follow the other; return a function that changes how many cores there are."""

    def give(count):
        monkeypatch.setattr("engine.inference.usable_cores", lambda: count)

    give(1)
    return give


def blobs(*places):
    """Return a picture [1, 1, SIZE, SIZE] with a smooth blob at each (column, row) off its middle pixel."""
    column, row = np.meshgrid(*[np.arange(SIZE) - SIZE // 2] * 2)
    picture = sum(np.exp(-((column - u) ** 2 + (row - v) ** 2) / 18) for u, v in places)
    return torch.from_numpy(picture.astype(np.float32))[None, None]


def centroid(img, label_img, mask):
    """Answer the middle of a picture, as a network that makes no error would; the maps hold its inputs."""
    weight = img[:, 0] / img.sum((1, 2, 3))[:, None, None]
    along = (torch.arange(SIZE) - SIZE // 2) / (SIZE - 1)
    u, v = (weight * along).sum((1, 2)), (weight * along[:, None]).sum((1, 2))
    uvd = torch.stack((u, v, label_img.sum((1, 2, 3))), -1)[:, None]
    return StageOutput(label_img, mask, uvd)


def inputs(img):
    label_img = torch.nn.functional.avg_pool2d(img, 2)
    return img, label_img, (label_img != 0).float()


def test_crops_are_turned_as_in_training_and_by_30_degrees_more_each():
    seen, img = [], blobs((12, -5), (-3, 9))
    average_over_turns(lambda *crop: seen.append(crop) or centroid(*crop), 5)(*inputs(img))
    for (turned, label_img, mask), angle_deg in zip(seen, (0, 30, -30, 60, -60), strict=True):
        expected = augment_image(img[0, 0].numpy(), Augmentation(angle_deg))
        assert np.abs(turned[0, 0].numpy() - expected).max() < 0.02
        assert torch.equal(mask, (label_img != 0).float())
        assert torch.allclose(label_img, torch.nn.functional.avg_pool2d(turned, 2), atol=1e-6)


def test_answers_of_turned_crops_are_turned_back():
    img = torch.cat((blobs((12, -5)), blobs((-9, -2), (1, 7))))
    alone, averaged = (forward(*inputs(img)) for forward in (centroid, average_over_turns(centroid, 12)))
    assert np.allclose(alone.uvd[0, 0, :2] * (SIZE - 1), (12, -5), atol=1e-3)
    assert torch.allclose(averaged.uvd[..., :2], alone.uvd[..., :2], atol=0.1 / SIZE)
    assert torch.allclose(averaged.uvd[..., 2], alone.uvd[..., 2], rtol=1e-3)
    assert torch.equal(averaged.heatmaps, alone.heatmaps) and torch.equal(averaged.depthmaps, alone.depthmaps)


def test_answers_are_averaged():
    answers, angles = np.random.default_rng(0).random((3, 1, 1, 3), np.float32), (0, 30, -30)
    each = iter(torch.from_numpy(answers))
    averaged = average_over_turns(lambda *crop: StageOutput(*crop[1:], next(each)), 3)
    back = [augment_joints(uvd[0], Augmentation(-angle)) for uvd, angle in zip(answers, angles)]
    assert np.allclose(averaged(*inputs(blobs((1, 2)))).uvd[0], np.mean(back, 0), atol=1e-6)


def test_crops_are_predicted_at_once_where_cores_are_free(cores, monkeypatch):
    img, all_there = blobs((12, -5)), Barrier(3)

    def waiting(*crop):
        all_there.wait(timeout=60)  # raises BrokenBarrierError where the three are not there together
        return centroid(*crop)

    expected = average_over_turns(centroid, 3)(*inputs(img))
    cores(6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    together = average_over_turns(waiting, 3)(*inputs(img))
    assert all(torch.equal(*fields) for fields in zip(together, expected))


@pytest.mark.parametrize("turns", [0, -1, 13])
def test_another_number_of_turns_is_refused(turns):
    with pytest.raises(UserError, match=f"turns must be 1 to 12, not {turns}"):
        HandPoseEstimator(turns=turns)
