"""Scoring images: FID and KID of two folders of PNGs, against torch-fidelity on the same images and network.

Both read the files, compute features of Inception-v3 and the metrics. Without Inception's weights they are random, which takes
as long. ``ratio NAME`` is torch-fidelity's time over ours; the values of both are printed, too.
"""

from common import bench_parser, print_ratios, quieten, seconds_of, time_in_turn  # isort: skip

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch_fidelity import calculate_metrics
from torch_fidelity import feature_extractor_inceptionv3 as inception

from ldm.evaluation.distances import frechet_distance, kernel_distance
from ldm.evaluation.features import load_feature_network
from ldm.evaluation.image_sets import Scorer, open_folder


class Untrained(inception.FeatureExtractorInceptionV3):
    """With random weights: those that it is given are not loaded."""

    def load_state_dict(self, *_: Any, **__: Any) -> Any: ...


def write_folder(folder: Path, count: int, side: int, seed: int) -> Path:
    """PNGs of smooth random colours."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for number in range(count):
        colours = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        colours.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.png")
    return folder


def provide_weights(folder: Path) -> Path:
    """The file of Inception's weights: the downloaded one, else random ones in ``folder``, where the network finds them."""
    name = inception.URL_INCEPTION_V3.rpartition("/")[2]
    if (downloaded := Path(torch.hub.get_dir()) / "checkpoints" / name).is_file():
        return downloaded
    print("Inception's weights are not here: random ones are taken")
    torch.hub.set_dir(str(folder))
    made = folder / "checkpoints" / name
    made.parent.mkdir()
    torch.save({}, made)
    torch.manual_seed(0)
    network = Untrained("inception-v3-compat", ["2048"], str(made))
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):  # else the features of all images are equal
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(network.state_dict(), made)
    return made


def main(options: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder, found = Path(temporary), dict[str, dict[str, float]]()
        real, made = (write_folder(folder / name, options.count, 256, seed) for seed, name in enumerate(("real", "made")))
        weights = str(provide_weights(folder))
        scorer = Scorer([load_feature_network("inception", device)], batch_size=options.batch_size)

        def ours() -> None:
            sets = [scorer.image_files(open_folder(each)).features[0] for each in (real, made)]
            found["ours"] = {"fid": frechet_distance(*sets), "kid": kernel_distance(*sets)}

        def theirs() -> None:
            settings = {"cuda": device == "cuda", "batch_size": options.batch_size, "verbose": False, "cache": False}
            values = calculate_metrics(
                input1=str(made),
                input2=str(real),
                fid=True,
                kid=True,
                kid_subset_size=min(1000, options.count),
                feature_extractor_weights_path=weights,
                **settings,
            )
            names = {"frechet_inception_distance": "fid", "kernel_inception_distance_mean": "kid"}
            found["torch-fidelity"] = {names.get(str(name), str(name)): value for name, value in values.items()}

        timed = {"ours": lambda: seconds_of(ours, device), "torch-fidelity": lambda: seconds_of(theirs, device)}
        seconds = time_in_turn(timed, options.rounds)
    for side, values in found.items():
        print(side, {name: round(value, 6) for name, value in values.items()})
    print_ratios({"scoring": [b / a for a, b in zip(seconds["ours"], seconds["torch-fidelity"], strict=True)]})


if __name__ == "__main__":
    parser = bench_parser(__doc__, "16 images, one round")
    parser.add_argument("--count", type=int, help="images of each folder (default: 512)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, help="default: 3")
    options = parser.parse_args()
    options.count = options.count or (16 if options.quick else 512)
    options.rounds = options.rounds or (1 if options.quick else 3)
    quieten()
    main(options)
