"""Scenes without end, as batches that are functions of a seed and a step number."""

import numpy as np

from cascade_jax.scenes import captions, world


def scene_batch(seed: int, step: int, batch: int, *, complete: bool = False) -> dict[str, np.ndarray]:
    """Random scenes, rendered. Row r depends on (seed, step, r) alone.

    Args:
      seed: of the whole sequence of batches.
      step: number of the batch.
      batch: number of rows, B.
      complete: whether ids say all there is to say of a scene, or only what a random caption of it says.

    Returns:
      images: uint8 [B, 128, 128, 3]
      ids: int32 [B, 10], see `captions.encode`
      cover: float32 [B, 128, 128], how much of each pixel is part of a thing
    """
    images, ids, covers = [], [], []
    for row in range(batch):
        rng = np.random.default_rng(np.random.SeedSequence((seed, step, row)))
        scene = world.sample_scene(rng)
        image, cover = world.render_and_cover(scene, rng)
        images.append(image)
        covers.append(cover)
        said = captions.attributes_of(scene) if complete else captions.parse(captions.describe(scene, rng))
        ids.append(captions.encode(said))
    return {"images": np.stack(images), "ids": np.stack(ids), "cover": np.stack(covers)}
