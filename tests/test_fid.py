"""The Fréchet Inception Distance, held against pytorch-fid's own steps written down in torch and SciPy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from cascade_jax import pictures
from cascade_jax.evaluation.metrics import Album
from cascade_jax.evaluation.metrics import fid as metric
from cascade_jax.evaluation.metrics.metric import FewPictures
from cascade_jax.evaluation.networks import inception as fid
from cascade_jax.evaluation.networks.moments import Moments, Statistics, statistics
from cascade_jax.models import inception


def gaussian(seed, size=96, samples=400):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(samples, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)
    return statistics(Moments.of(mixed))


def theirs(a, b):
    """`calculate_frechet_distance` of pytorch-fid."""
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    shift = a.mean - b.mean
    return shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root)


def test_the_formula_is_scipys_to_a_millionth():
    a, b = gaussian(0), gaussian(1)
    known = fid.Distance(fid.Network(None), Statistics(b.mean, b.covariance))
    np.testing.assert_allclose(known.of(Statistics(a.mean, a.covariance)), theirs(a, b), rtol=1e-6)
    with pytest.raises(ValueError, match="the reference has 96 features, and pictures 5"):
        known.of(Statistics(np.zeros(5), np.eye(5)))


def test_moments_of_parts_merge_into_those_of_the_whole_in_any_order():
    features = np.random.default_rng(2).normal(size=(103, 7)).astype(np.float32) * 5 + 1000
    parts = [Moments.of(part) for part in np.split(features, [1, 40, 41, 90])]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        merged = Moments()
        for part in order:
            merged = merged.merged(parts[part])
        pair = parts[order[0]].merged(parts[order[1]]).merged(parts[order[2]])
        rest = parts[order[3]].merged(parts[order[4]])
        for found in (merged, pair.merged(rest)):
            assert found.count == 103
            # float64's rounding of sums of squares of a thousand
            np.testing.assert_allclose(found.mean, features.astype(np.float64).mean(axis=0), rtol=1e-12)
            np.testing.assert_allclose(
                statistics(found).covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9
            )


def save(folder, images, suffix=".png"):
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}{suffix}")
    return folder


def noise(count, shape=(20, 30), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape, 3), np.uint8)


def test_pictures_reach_the_network_as_pytorch_fid_prepares_them(tmp_path):
    rng = np.random.default_rng(4)
    (tmp_path / "in").mkdir()
    Image.fromarray(rng.integers(0, 256, (40, 52), np.uint8), "L").save(tmp_path / "in" / "a.png")
    Image.fromarray(rng.integers(0, 256, (40, 52, 4), np.uint8), "RGBA").save(tmp_path / "in" / "b.png")
    Image.fromarray(rng.integers(0, 256, (40, 52, 3), np.uint8)).save(tmp_path / "in" / "c.jpg")
    found = pictures.paths(tmp_path / "in")
    assert [path.name for path in found] == ["a.png", "b.png", "c.jpg"]
    (ours,) = pictures.batches(found, 8)
    prepared = np.asarray(inception.prepared(ours / np.float32(255), 299))
    for path, own in zip(found, prepared):
        picture = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)
        scaled = picture.to(torch.float32).div(255)[None]
        sized = torch.nn.functional.interpolate(scaled, size=(299, 299), mode="bilinear", align_corners=False)
        expected = (2 * sized - 1)[0].permute(1, 2, 0)
        np.testing.assert_allclose(own, expected, atol=2e-6)  # float32's rounding of values around one


def colours(images):
    """In place of Inception: the mean and spread of each channel."""
    values = images.astype(np.float32) / 255
    return np.concatenate([values.mean(axis=(1, 2)), values.std(axis=(1, 2))], axis=1)


NETWORK = fid.Network(colours, "colours")


def test_a_folder_in_batches_is_the_folder_at_once(tmp_path):
    folder, seen = save(tmp_path / "a", noise(11)), []

    def watched(images):
        seen.append(len(images))
        return colours(images)

    told, found = [], pictures.paths(folder)
    parts = fid.gather(
        fid.Network(watched), pictures.batches(found, 4), found, batch=4, progress=lambda *done: told.append(done)
    )
    assert set(seen) == {4}  # one program
    assert told == [(4, 11), (8, 11), (11, 11)]
    expected = Moments.of(colours(noise(11)))
    assert parts.count == 11
    np.testing.assert_allclose(parts.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(parts.scatter, expected.scatter, rtol=1e-9)


def album(folder, keep=None):
    found = pictures.paths(folder)
    return Album([""] * len(found), lambda: map(pictures.read, found), found, keep)


def test_a_distance_to_itself_is_nothing_and_few_pictures_are_warned_of(tmp_path):
    folder = save(tmp_path / "a", noise(6))
    other = save(tmp_path / "b", noise(6, seed=1) // 2)
    measure = metric.gauge(fid.Distance(NETWORK, fid.reference(NETWORK, folder))).measure
    with pytest.warns(FewPictures) as warned:
        assert measure(album(folder), None) == pytest.approx(0, abs=1e-9)
    assert [str(one.message).partition(" features")[0] for one in warned] == [
        "there are only 6 pictures, fewer than Inception's 2,048",
        "there are only 6 pictures of the reference, fewer than Inception's 2,048",
    ]
    with pytest.warns(FewPictures):
        assert measure(album(other), None) > 0.01


def test_statistics_are_kept_and_read_as_pytorch_fid_has_them(tmp_path):
    folder, kept = save(tmp_path / "a", noise(5)), tmp_path / "reference.npz"
    measured = fid.reference(NETWORK, folder, keep=kept)
    with np.load(kept) as stored:
        assert stored["mu"].shape == (6,)
        assert stored["sigma"].shape == (6, 6)
    fails = fid.Network(lambda images: pytest.fail("measured again"), "colours")
    again = fid.reference(fails, folder, keep=kept)
    np.testing.assert_array_equal(again.covariance, measured.covariance)
    assert again.count == 5
    other = fid.reference(fid.Network(lambda images: 2 * colours(images), "twice"), folder, keep=kept)
    np.testing.assert_allclose(other.mean, 2 * measured.mean)
    np.savez(tmp_path / "theirs.npz", mu=measured.mean, sigma=measured.covariance)
    published = fid.reference(NETWORK, tmp_path / "theirs.npz")
    np.testing.assert_array_equal(published.mean, measured.mean)
    assert published.count is None


def test_statistics_of_an_album_are_kept_in_its_folder(tmp_path):
    folder, known = save(tmp_path / "a", noise(5)), Statistics(np.zeros(6), np.eye(6))
    found = metric.gauge(fid.Distance(NETWORK, known)).measure(album(folder, tmp_path), None)
    again = metric.gauge(fid.Distance(fid.Network(lambda images: pytest.fail("measured again"), "colours"), known))
    assert again.measure(album(folder, tmp_path), None) == found


def test_what_is_not_finite_is_named_and_never_a_number(tmp_path):
    folder, known = save(tmp_path / "a", noise(5)), Statistics(np.zeros(6), np.eye(6))

    def damaged(images):
        features = colours(images)
        features[images.mean(axis=(1, 2, 3)) == noise(5)[3].mean()] = np.nan
        return features

    with pytest.raises(ValueError, match=r"FID is unknown: Inception's feature of .*003\.png is not finite"):
        metric.gauge(fid.Distance(fid.Network(damaged), known)).measure(album(folder), None)
    with pytest.raises(ValueError, match=r"FID is unknown: Inception's feature of .*003\.png is not finite"):
        fid.reference(fid.Network(damaged), folder)
    np.savez(tmp_path / "nan.npz", mu=np.full(6, np.nan), sigma=np.eye(6))
    with pytest.raises(ValueError, match=r"nan\.npz holds statistics for FID that are not finite"):
        fid.reference(NETWORK, tmp_path / "nan.npz")
    for mean, covariance in ((np.full(6, np.inf), np.eye(6)), (np.zeros(6), np.full((6, 6), np.nan))):
        with pytest.raises(ValueError, match="FID is unknown: the statistics of the reference are not finite"):
            fid.Distance(NETWORK, Statistics(mean, covariance)).of(known)


def test_bad_folders_and_files_are_refused(tmp_path):
    empty = save(tmp_path / "empty", [])
    mixed = save(tmp_path / "mixed", [*noise(3), *noise(1, (30, 20))])
    one = save(tmp_path / "one", noise(1))
    broken = save(tmp_path / "broken", noise(2))
    (broken / "001.png").write_bytes((broken / "001.png").read_bytes()[:200])
    for source, message in (
        (tmp_path / "none", "there is no folder of pictures"),
        (empty, "holds no pictures"),
        (mixed, r"have different sizes \(30 x 20 and 20 x 30 pixels: 003.png\)"),
        (one, "takes two pictures or more, and there is 1"),
        (broken, "cannot read the picture .*001.png"),
    ):
        with pytest.raises(ValueError, match=message):
            fid.reference(NETWORK, source)
    squared = fid.reference(NETWORK, mixed, square=16)
    assert squared.count == 4
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "text.npz").write_text("no")
    for name, message in (
        ("odd.npz", r"a mean \(3,\) and a covariance \(2, 2\)"),
        ("other.npz", "holds no statistics"),
        ("text.npz", "holds no statistics"),
    ):
        with pytest.raises(ValueError, match=message):
            fid.reference(NETWORK, tmp_path / name)
    with pytest.raises(ValueError, match="holds statistics, and no pictures that could be cropped"):
        fid.reference(NETWORK, tmp_path / "odd.npz", square=16)
