from itertools import islice

import numpy as np
import pytest
import torch

from ldm.data.datamodule import ShardDataModule
from ldm.data.images import ImageDataset
from ldm.data.latents import LatentDataset, write_chunk
from ldm.data.manifest import LATENT_SHARDS, Manifest
from ldm.data.plan import Plan
from ldm.data.shards import ShardWriter
from ldm.errors import UsageError


@pytest.fixture(scope="module")
def latent_shards(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    with ShardWriter(folder, "latents") as writer:
        mean, std = rng.normal(size=(2, 10, 4, 2, 2)).astype(np.float32)
        texts = [rng.normal(size=(1 + index % 3, 6)).astype(np.float32) for index in range(10)]
        keys = [str(index) for index in range(10)]
        write_chunk(writer, "0", mean, std, texts, keys, keys)
    (entry,) = writer.entries
    Manifest(LATENT_SHARDS, (type(entry)(entry.name, 10, entry.bytes, entry.sha256),)).save(folder)
    return folder


@pytest.fixture(params=["images", "latents"])
def folder(request, image_shards, latent_shards):
    return {"images": image_shards, "latents": latent_shards}[request.param]


def module(folder, **settings):
    made = ShardDataModule(str(folder), str(folder), batch_size=3, seed=5, **settings)
    made.setup("fit")
    return made


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name] for name in a)


def take(loader, count):
    """The first batches; an endless loader's workers end with its iterator."""
    return list(islice(iter(loader), count))


def test_training_batches_follow_the_plan_without_end(folder):
    made = module(folder)
    kind = LatentDataset if "latents" in str(folder) else ImageDataset
    dataset = kind(folder)
    assert type(made.train_set) is kind
    found = take(made.train_dataloader(), 8)  # three to an epoch
    for batch, indices in zip(found, islice(Plan(10, 3, seed=5).batches(), 8), strict=True):
        assert same(batch, dataset.collate([dataset[index] for index in indices]))


@pytest.mark.filterwarnings("ignore")
def test_workers_change_no_batch(folder):
    plain, workers = module(folder), module(folder, workers=2)
    for ours, theirs in zip(take(plain.train_dataloader(), 7), take(workers.train_dataloader(), 7), strict=True):
        assert same(ours, theirs)
    for ours, theirs in zip(plain.val_dataloader(), workers.val_dataloader(), strict=True):
        assert same(ours, theirs)


def test_validation_is_the_first_samples_always_in_order(folder):
    made = module(folder, validation_samples=7)
    made.setup("validate")
    sizes = [len(batch["text_mask"] if "text_mask" in batch else batch["key"]) for batch in made.val_dataloader()]
    assert sizes == [3, 3, 1]
    for batch, again in zip(made.val_dataloader(), made.val_dataloader(), strict=True):
        assert same(batch, again)
    dataset = made.validation_set
    assert same(next(iter(made.val_dataloader())), dataset.collate([dataset[index] for index in range(3)]))
    assert sum(1 for _ in module(folder, validation_samples=1000).val_dataloader()) == 4


def test_the_seed_orders_the_training(folder):
    first, second = module(folder), module(folder)
    second.seed = 6
    pairs = zip(take(first.train_dataloader(), 3), take(second.train_dataloader(), 3), strict=True)
    assert not all(same(ours, theirs) for ours, theirs in pairs)


def test_pictures_are_fitted_to_the_size_asked_for(image_shards):
    (batch,) = take(module(image_shards, image_size=8).train_dataloader(), 1)
    assert batch["image"].shape == (3, 3, 8, 8)


def test_too_few_samples_are_refused(folder):
    made = ShardDataModule(str(folder), str(folder), batch_size=11)
    made.setup("fit")
    with pytest.raises(UsageError, match=r"10 samples do not fill one batch of data.batch_size 11"):
        made.train_dataloader()
