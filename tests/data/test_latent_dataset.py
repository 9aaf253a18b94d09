"""Latents by sample number and in batches: what was stored, of the draw's choice, from memory of the loader's."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.data.image_dataset import Augmentation
from ldm.data.latent_dataset import LatentDataset
from ldm.data.latent_schema import Chunk, TextInfo
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest
from ldm.data.plan import PlannedSample
from ldm.data.quarantine import BadSample
from ldm.data.shards import ShardReader
from ldm.data.sources import open_source
from ldm.data.writer import ShardWriter
from ldm.errors import LdmError, UsageError
from tests import samples
from tests.samples import same

INFO = replace(
    samples.INFO,
    text_encoders=(TextInfo("minilm", "t" * 64, 6, 5, 0), TextInfo("other", "u" * 64, 3, 5, 0)),
    latent_shapes=((4, 2, 3),),
    dtype="float16",
)
SHARDS = [[3, 2], [4], [1, 1, 1]]  # images per chunk, per shard
TOTAL = 12
LATENTS = ("mean", "std", "mean_flip", "std_flip")
NULL = np.full((2, 6), 7.0, np.float32)


def make_images(dtype: type[np.floating] = np.float16, names=LATENTS, shape=(4, 2, 3)):
    """Twelve images of one to three captions, these of one to five tokens and two widths."""
    rng = np.random.default_rng(0)
    for index in range(TOTAL):
        captions = 1 + index % 3
        texts = [[rng.normal(size=(1 + (index + j) % 5, width)).astype(dtype) for j in range(captions)] for width in (6, 3)]
        yield {name: rng.uniform(0.1, 1, size=shape).astype(dtype) for name in names} | {"texts": texts}


def write(folder, made=None, info=INFO):
    """Shards of ``images``, in chunks of ``SHARDS``."""
    made, entries, first = [*made] if made else [*make_images()], [], 0
    folder.mkdir()
    for number, sizes in enumerate(SHARDS):
        with ShardWriter(folder, "latents", first_index=number) as writer:
            for chunk, size in enumerate(sizes):
                few = made[first : first + size]
                keys = [f"{first + row:02d}" for row in range(size)]
                captions = [[f"{key}, {j}" for j in range(len(one["texts"][0]))] for key, one in zip(keys, few, strict=True)]
                latents = {name: np.stack([one[name] for one in few]) for name in few[0] if name != "texts"}
                texts = [[text for one in few for text in one["texts"][encoder]] for encoder in range(len(few[0]["texts"]))]
                sizes_of = 24 + np.arange(first, first + size)[:, None] * [1, 2], np.full((size, 4), 24)
                writer.write(f"{chunk:08d}", Chunk(keys, captions, latents, texts, *sizes_of).members())
                first += size
        entries.append(replace(writer.entries[0], samples=sum(sizes)))
    Manifest(LATENT_SHARDS, tuple(entries), info.as_extra()).save(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "latents")


def test_original_sizes_and_crops_are_read_where_they_are_asked_for(folder):
    batch = LatentDataset(folder, read_sizes=True).batch([4, 0])
    assert batch["original_size"].tolist() == [[28, 32], [24, 24]] and batch["crop"].tolist() == [[24] * 4] * 2
    plain = LatentDataset(folder).batch([4, 0])
    assert plain.keys() == batch.keys() - {"original_size", "crop"}
    assert all(torch.equal(plain[name], batch[name]) for name in plain if name != "bad")


def texts_of(batch):
    """Each sample's text without its padding."""
    return [text[mask.bool()].numpy() for text, mask in zip(batch["text"], batch["text_mask"], strict=True)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("encoder", [0, 1])
def test_what_is_written_is_read_back(tmp_path, dtype, encoder):
    dataset = LatentDataset(write(tmp_path / "latents", make_images(dtype)), text_encoder=encoder)
    assert len(dataset) == TOTAL
    for found, expected in zip((dataset[index] for index in range(TOTAL)), make_images(dtype), strict=True):
        assert found.keys() == {"mean", "std", "text"}
        for name, array in (("mean", expected["mean"]), ("std", expected["std"]), ("text", expected["texts"][encoder][0])):
            assert found[name].dtype == dtype and np.array_equal(found[name], array)
            assert not found[name].flags.writeable  # of the file itself
    for index in (-1, TOTAL):
        with pytest.raises(IndexError):
            dataset[index]


def test_of_modes_there_is_no_deviation(tmp_path):
    folder = write(tmp_path / "latents", make_images(names=("mean",)), replace(INFO, posterior="mode", flips=False))
    dataset = LatentDataset(folder)
    assert dataset[0].keys() == {"mean", "text"}
    assert dataset.batch([1, 2]).keys() == {"mean", "text", "text_mask", "bad"}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_batch_keeps_order_and_dtype_and_pads_with_zeros_that_it_masks(tmp_path, dtype):
    dataset, made = LatentDataset(write(tmp_path / "latents", make_images(dtype))), [*make_images(dtype)]
    batch = dataset.batch([4, 0, 7, 4])  # 5, 1, 3 and 5 tokens
    stored = torch.from_numpy(np.zeros(0, dtype)).dtype
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items() if name != "bad"} == {
        "mean": (stored, (4, 4, 2, 3)),
        "std": (stored, (4, 4, 2, 3)),
        "text": (stored, (4, 16, 6)),
        "text_mask": (torch.int64, (4, 16)),
    }
    assert batch["bad"] == [[]] * 4
    assert batch["text_mask"].tolist() == [[1] * tokens + [0] * (16 - tokens) for tokens in (5, 1, 3, 5)]
    assert not batch["text"][~batch["text_mask"].bool()].any()
    for row, (index, text) in enumerate(zip((4, 0, 7, 4), texts_of(batch), strict=True)):
        assert np.array_equal(text, made[index]["texts"][0][0])
        for name in ("mean", "std"):
            assert np.array_equal(batch[name][row].numpy(), made[index][name])
    batch["mean"] += 1  # a copy: the shard is read-only
    assert np.array_equal(dataset[4]["mean"], made[4]["mean"])


def test_a_batch_is_its_samples_put_together_in_memory_of_the_callers(folder):
    dataset, memory = LatentDataset(folder, Augmentation(flip=0.5, caption="random", caption_dropout=0.3), NULL), []

    def empty(shape, dtype):
        """Full of what an earlier batch left there."""
        memory.append(torch.full(shape, 255, dtype=dtype))
        return memory[-1]

    draws = [PlannedSample(index * 5 % TOTAL, 100 + index) for index in range(9)]
    batch = dataset.batch(draws, empty)
    assert same(batch, dataset.batch(draws)) and same(batch, dataset.collate(dataset.__getitems__(draws)))
    assert len(memory) == 1  # the loader's goes round once for each batch
    storages = {value.untyped_storage().data_ptr() for value in batch.values() if isinstance(value, torch.Tensor)}
    assert storages == {memory[0].data_ptr()}


def test_a_draw_is_the_same_alone_and_in_any_batch(folder):
    dataset = LatentDataset(folder, Augmentation(flip=0.5, caption="random", caption_dropout=0.3, seed=1), NULL)
    draws = [PlannedSample(index % TOTAL, 10**12 + index) for index in range(60)]
    alone = [dataset.batch([draw]) for draw in draws]
    for some in (draws, draws[::-1], draws[7:9]):
        batch = dataset.batch(some)
        texts = texts_of(batch)
        for row, draw in enumerate(some):
            single = alone[draws.index(draw)]
            assert torch.equal(batch["mean"][row], single["mean"][0]) and torch.equal(batch["std"][row], single["std"][0])
            assert np.array_equal(texts[row], texts_of(single)[0])


def choices(dataset, made, draws):
    """For each draw: whether it is mirrored, and which caption it has, None for the dropped one."""
    batch = dataset.batch(draws)
    found = []
    for row, (draw, text) in enumerate(zip(draws, texts_of(batch), strict=True)):
        image = made[draw.sample]
        mirrored = np.array_equal(batch["mean"][row].numpy(), image["mean_flip"])
        end = "_flip" if mirrored else ""
        for name in ("mean", "std"):
            assert np.array_equal(batch[name][row].numpy(), image[name + end])
        if np.array_equal(text, NULL):
            found.append((mirrored, None))
        else:
            (caption,) = [j for j, other in enumerate(image["texts"][0]) if np.array_equal(text, other)]
            found.append((mirrored, caption))
    return found


def test_flips_captions_and_dropout_come_at_the_rates_asked_for_and_know_nothing_of_one_another(folder):
    how, made = Augmentation(flip=0.25, caption="random", caption_dropout=0.1, seed=3), [*make_images()]
    dataset, number = LatentDataset(folder, how, NULL), 2400
    draws = [PlannedSample(2 + 3 * (index % 4), index) for index in range(number)]  # images of three captions
    found = choices(dataset, made, draws)
    mirrored = np.array([flip for flip, _ in found], float)
    dropped = np.array([caption is None for _, caption in found], float)
    kept = np.array([caption for _, caption in found if caption is not None])

    def near(values, share):
        return abs(np.mean(values) - share) < 4 * (share * (1 - share) / len(values)) ** 0.5

    assert near(mirrored, 0.25) and near(dropped, 0.1)
    assert all(near(kept == caption, 1 / 3) for caption in range(3))
    # neither with one another nor with the draw before
    pairs = [(mirrored, dropped), (mirrored[:-1], mirrored[1:]), (dropped[:-1], dropped[1:]), (mirrored[dropped == 0], kept)]
    assert all(abs(np.corrcoef(*pair)[0, 1]) < 4 / len(pair[0]) ** 0.5 for pair in pairs)
    other = choices(LatentDataset(folder, replace(how, seed=4), NULL), made, draws)
    assert near([flip == before for (flip, _), (before, _) in zip(other, found, strict=True)], 0.25**2 + 0.75**2)


def test_certain_and_impossible_are_just_that(folder):
    made, draws = [*make_images()], [PlannedSample(index % TOTAL, index) for index in range(200)]
    for flip, dropout in ((0.0, 1.0), (1.0, 0.0)):
        dataset = LatentDataset(folder, Augmentation(flip=flip, caption_dropout=dropout, seed=3), NULL)
        expected = bool(flip), None if dropout else 0
        assert set(choices(dataset, made, draws)) == {expected}


def test_without_a_draw_nothing_is_random(folder):
    dataset = LatentDataset(folder, Augmentation(flip=1.0, caption="random", caption_dropout=1.0), NULL)
    plain = LatentDataset(folder)
    assert same(dataset.batch(range(TOTAL)), plain.batch(range(TOTAL)))
    assert same(plain.batch([PlannedSample(3, 8)]), plain.batch([3]))


def test_the_null_text_is_of_the_dtype_of_the_others(folder):
    batch = LatentDataset(folder, Augmentation(caption_dropout=0.5), NULL).batch(
        [PlannedSample(0, index) for index in range(20)]
    )
    assert batch["text"].dtype == torch.float16 and {len(text) for text in texts_of(batch)} == {1, 2}


def test_several_sizes_in_one_batch_are_named(tmp_path):
    made = [*make_images()]
    for index, other in zip((5, 6, 7, 8), make_images(shape=(4, 5, 1)), strict=False):
        made[index] = other
    dataset = LatentDataset(write(tmp_path / "latents", made))
    assert dataset.batch([5, 8])["mean"].shape == (2, 4, 5, 1) and dataset.batch([0, 11])["std"].shape == (2, 4, 2, 3)
    message = r"^one batch holds latents of several sizes \(3 x 2, 1 x 5\); export them with one image_size$"
    with pytest.raises(LdmError, match=message):
        dataset.batch([0, 5])


def test_chunks_are_the_whole_set_in_order(folder):
    chunks, made = [*LatentDataset(folder).chunked()], [*make_images()]
    assert [len(tensors["mean"]) for tensors in chunks] == [size for sizes in SHARDS for size in sizes]
    for name in LATENTS:
        assert np.array_equal(np.concatenate([tensors[name] for tensors in chunks]), np.stack([one[name] for one in made]))


def test_it_can_be_sent_to_another_process(folder):
    dataset = LatentDataset(folder)
    dataset[5]
    data = pickle.dumps(dataset)
    assert len(data) < 6000  # where the chunks lie, not what they hold
    assert same(pickle.loads(data).batch(range(TOTAL)), dataset.batch(range(TOTAL)))


def test_a_manifest_that_counts_otherwise_is_refused(folder):
    manifest = Manifest.load(folder)
    Manifest(LATENT_SHARDS, (replace(manifest.shards[0], samples=6), *manifest.shards[1:]), manifest.extra).save(folder)
    dataset = LatentDataset(folder)
    with pytest.raises(LdmError, match=r"latents-00000.tar holds 5 latents, its manifest says 6; export again"):
        dataset[0]
    assert np.array_equal(dataset[6]["mean"], [*make_images()][5]["mean"])  # the other shards


def test_image_shards_are_refused(folder):
    Manifest(IMAGE_SHARDS, Manifest.load(folder).shards).save(folder)
    with pytest.raises(UsageError, match="describes ldm-image-shards, but ldm-latent-shards are needed"):
        LatentDataset(folder)


def overwrite(folder, chunk, start, data):
    """Damage a chunk of the first shard, at a byte of its safetensors."""
    shard = folder / "latents-00000.tar"
    offset = ShardReader(shard).spans(chunk)["safetensors"][0]
    whole = bytearray(shard.read_bytes())
    whole[offset + start : offset + start + len(data)] = data
    shard.write_bytes(whole)


def test_a_broken_chunk_costs_its_shard_which_is_named(folder):
    overwrite(folder, 0, 8, b"\xff" * 32)
    dataset, shard = LatentDataset(folder), folder / "latents-00000.tar"
    found = [dataset.attempt(index) for index in range(TOTAL)]
    bad = [sample for sample in found if isinstance(sample, BadSample)]
    assert [sample.key for sample in bad] == [f"#{row}" for row in range(5)] and set(map(type, found[5:])) == {dict}
    assert {sample.shard for sample in bad} == {str(shard)}
    assert all("is in a chunk that is no safetensors of latents" in sample.reason for sample in bad)
    with pytest.raises(LdmError, match=r"latents-00000.tar: #4 is in a chunk that is no safetensors.*ldm shards check"):
        dataset[4]


def test_in_a_batch_the_next_good_one_takes_the_place_of_a_bad_one_with_the_drawn_choices(folder):
    how = Augmentation(flip=0.5, caption="random", caption_dropout=0.3)
    whole, draws = (
        LatentDataset(folder, how, NULL),
        [PlannedSample(7, 0), PlannedSample(3, 1), PlannedSample(9, 2), PlannedSample(4, 3)],
    )
    instead = whole.batch([PlannedSample(7, 0), PlannedSample(5, 1), PlannedSample(9, 2), PlannedSample(5, 3)])
    overwrite(folder, 1, 8, b"\xff" * 32)
    dataset = LatentDataset(folder, how, NULL)
    batch = dataset.batch(draws)
    assert [[sample.key for sample in bad] for bad in batch.pop("bad")] == [[], ["#3", "#4"], [], ["#4"]]
    assert same(batch, {name: value for name, value in instead.items() if name != "bad"})
    dataset.max_in_a_row = 1
    with pytest.raises(LdmError, match=r"^2 samples in a row cannot be used, the last one .*latents-00000.tar: #4 is in a"):
        dataset.batch(draws)


@pytest.mark.parametrize("lost", ["mean_flip", "std_flip", "text_2_start"])
def test_the_samples_of_a_chunk_without_what_its_manifest_says_are_bad(tmp_path, lost):
    made = [*make_images()]
    for image in made[:3]:
        if lost == "text_2_start":
            del image["texts"][1]
        else:
            del image[lost]
    folder = write(tmp_path / "latents", made)
    dataset = LatentDataset(folder, Augmentation(flip=1.0), NULL, text_encoder=1)
    batch, shard = dataset.batch([PlannedSample(1, 0)]), str(folder / "latents-00000.tar")
    reason = f"is in a chunk without '{lost}'"
    assert batch["bad"] == [[BadSample(shard, "01", reason), BadSample(shard, "02", reason)]]
    assert np.array_equal(batch["mean"][0].numpy(), made[3]["mean_flip"])


def test_several_folders_of_different_dtypes_meet_in_the_wider_one(tmp_path):
    folders = [write(tmp_path / "half"), write(tmp_path / "full", make_images(np.float32))]
    batch = LatentDataset([open_source(folder) for folder in folders]).batch([2, TOTAL + 2])
    assert batch["mean"].dtype == batch["text"].dtype == torch.float32
    half, full = (LatentDataset(folder)[2] for folder in folders)
    assert np.array_equal(batch["mean"][0].numpy(), half["mean"].astype(np.float32))
    assert np.array_equal(batch["mean"][1].numpy(), full["mean"])
